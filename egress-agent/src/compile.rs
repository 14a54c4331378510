//! From policies to exact map contents. Pure: the same documents give the same [`Ruleset`], whatever their order.
//!
//! Two steps, each a module: [`combine`] asks which policies speak for a workload and writes down what they say as a
//! list of [`Statement`]s; [`flatten`] merges all that cover an address, so that one look-up is the whole answer.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::IpAddr,
};

use combine::Combined;
use egress_common::{Action, RuleId};
use ipnet::IpNet;

use crate::{
    policy::{EgressPolicy, HostPattern, L4, Mode, PolicySet, RuleName, Selector},
    ruleset::{Ruleset, rule_id},
    workload::{Workload, selects_any},
};

pub mod combine;
pub mod flatten;
mod ports;

/// Why a policy was not compiled: refused as a whole, before anything of it is put in force.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum CompileError {
    /// Too many port ranges.
    #[error(
        "the policy needs more than {limit} port ranges, since too many rules with ports of their own overlap: merge their \
         ports or their prefixes"
    )]
    TooManyRanges {
        /// As many are allowed.
        limit: usize,
    },
    /// Too many overlapping rules.
    #[error(
        "the policy has too many overlapping rules: all distinct sets of them together hold more than {limit}; merge rules \
         or prefixes"
    )]
    TooManyOverlaps {
        /// As many are allowed.
        limit: usize,
    },
}

/// What a ruleset depends on besides the documents.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Context {
    /// The policy of workloads that no enforcing policy selects.
    pub node_default: NodeDefault,
    /// What `dns: { servers: System }` means.
    pub system_resolvers: Vec<IpAddr>,
    /// What is known of host names.
    pub names: Names,
    /// What holds of pods alone.
    pub pods: PodContext,
    /// Who resolves names for the whole host.
    pub shared_resolvers: Vec<Selector>,
}

impl Context {
    /// Nothing is known but the node's default.
    pub fn new(node_default: NodeDefault) -> Self {
        let (system_resolvers, names, pods) = (Vec::new(), Names::default(), PodContext::default());
        Self { node_default, system_resolvers, names, pods, shared_resolvers: Vec::new() }
    }
}

/// What the rules of pods depend on besides the documents.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PodContext {
    /// What `dns: { servers: System }` means for pods; the system's resolvers if none is named.
    pub resolvers: Vec<IpAddr>,
    /// The networks of the cluster, which every pod may reach unless a rule denies it: Istio lets traffic within a mesh through.
    pub internal: Vec<IpNet>,
}

/// Addresses of host names; names are in lower case, without a trailing dot.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Names(pub BTreeMap<String, BTreeSet<IpAddr>>);

impl Names {
    /// The addresses of every known name that a pattern covers.
    pub fn addresses<'a>(&'a self, pattern: &'a HostPattern) -> impl Iterator<Item = IpAddr> + 'a {
        let exact = match pattern {
            HostPattern::Exact(name) => self.0.get(name),
            HostPattern::Below(_) | HostPattern::Ending(_) => None,
        };
        let is_exact = matches!(pattern, HostPattern::Exact(_));
        let covered = self.0.iter().filter(move |(name, _)| !is_exact && pattern.covers(name)).map(|(_, found)| found);
        exact.into_iter().chain(covered).flatten().copied()
    }
}

/// `builtin/default`: see [`combine`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NodeDefault {
    /// Deny, Allow or Audit.
    pub action: NodeAction,
    /// Whether it opens loopback addresses.
    pub loopback: bool,
    /// Whether it opens the system's resolvers.
    pub dns: bool,
}

/// `--default`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, clap::ValueEnum)]
#[value(rename_all = "PascalCase")]
pub enum NodeAction {
    /// Only what a `ServiceEntry` names (Istio's `REGISTRY_ONLY`).
    Deny,
    /// Everything (Istio's `ALLOW_ANY`).
    Allow,
    /// Everything, and what Deny would refuse is reported.
    Audit,
}

/// One rule of one view: what it says, of which addresses and ports.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Statement {
    /// Its identity.
    pub name: RuleName,
    /// What it does.
    pub action: Action,
    /// Each part pairs addresses with ports; the parts are OR-ed.
    pub parts: Vec<Part>,
}

/// Some addresses and the ports a statement speaks of there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Part {
    /// OR-ed.
    pub blocks: Vec<Block>,
    /// Names that may turn out to have other addresses; OR-ed with the blocks.
    pub hosts: Vec<HostPattern>,
    /// OR-ed.
    pub ports: Vec<Ports>,
}

/// Addresses in `cidr` and in none of `except`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Block {
    /// Where the block begins and ends.
    pub cidr: IpNet,
    /// Holes in it.
    pub except: Vec<IpNet>,
}

impl From<IpNet> for Block {
    fn from(cidr: IpNet) -> Self {
        Self { cidr, except: Vec::new() }
    }
}

impl From<IpAddr> for Block {
    fn from(address: IpAddr) -> Self {
        IpNet::from(address).into()
    }
}

/// A range of ports of one protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ports {
    /// TCP or UDP.
    pub l4: L4,
    /// First port.
    pub low: u16,
    /// Last port, inclusive.
    pub high: u16,
}

/// Compiles what the policies say of one workload.
pub fn compile(policies: &PolicySet, workload: &Workload, context: &Context) -> Result<Ruleset, CompileError> {
    let serves_dns = selects_any(&context.shared_resolvers, workload);
    let ruleset = compile_selecting(policies, &combine::selecting(policies, workload), workload, context)?;
    Ok(if serves_dns { ruleset.with_dns_service() } else { ruleset })
}

/// The same, where it is known which policies select the workload, of which nothing else matters then but its pod. It does not
/// resolve names for the whole host.
pub(crate) fn compile_selecting(
    policies: &PolicySet,
    selecting: &[&EgressPolicy],
    workload: &Workload,
    context: &Context,
) -> Result<Ruleset, CompileError> {
    let view = |mode| combine::combine_selecting(policies, selecting, workload, context, mode);
    // The enforcing view always exists: where no policy enforces, the node default does.
    let enforcing = view(Mode::Enforce).unwrap_or_else(Combined::allow_any);
    assemble(&enforcing, view(Mode::Audit).as_ref())
}

/// Flattens both views over one table of rule names, which is sorted as far as the names say and so the same for the
/// same documents.
pub(crate) fn assemble(enforcing: &Combined, with_audit: Option<&Combined>) -> Result<Ruleset, CompileError> {
    let all = enforcing.statements.iter().chain(with_audit.iter().flat_map(|combined| &combined.statements));
    let names: BTreeSet<&RuleName> = all.map(|statement| &statement.name).collect();
    let ids: HashMap<&RuleName, RuleId> =
        names.iter().enumerate().map(|(index, &name)| (name, rule_id(index))).collect();
    let table = |combined: &Combined| {
        let ids: Vec<RuleId> = combined.statements.iter().map(|statement| ids[&statement.name]).collect();
        let table = flatten::flatten(&combined.statements, &ids, combined.default)?;
        Ok(table.with_settings(combined.settings).with_resolvers(combined.resolvers.clone()))
    };
    Ok(Ruleset {
        enforcing: table(enforcing)?,
        with_audit: with_audit.map(table).transpose()?,
        rules: names.into_iter().cloned().collect(),
    })
}
