//! Other filters of ours that judge a cgroup, too: of another agent, of one that was killed and left its pins elsewhere, of
//! a daemon above the command of `exec`. A connection must pass all of them.
//!
//! Only whoever has `CAP_SYS_ADMIN` may ask the kernel for a program by its number, and so learns whose it is. Without it,
//! programs on every hook that each of our filters needs, and nobody else uses together, are taken for one.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    fs::File,
    io,
    os::fd::AsFd,
    path::Path,
};

use egress_common::{Hook, Meta, map};
use serde::{Deserialize, Serialize};
use zerocopy::transmute;

use super::{programs::attach_type, sys};
use crate::cgroup::below;

/// Another filter of ours.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Other {
    /// The cgroup that it is attached to, as a path from the root of the hierarchy.
    pub cgroup: String,
    /// The agent or `exec` that made it, if that is known. It may have ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pid: Option<u32>,
    /// Its version.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version: Option<String>,
    /// Counts the policies that it put in force.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub generation: Option<u64>,
    /// The hooks.
    pub hooks: Vec<String>,
}

impl fmt::Display for Other {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "another filter judges {} too", self.cgroup)?;
        if let (Some(pid), Some(version), Some(generation)) = (self.pid, &self.version, self.generation) {
            write!(f, ", of egress-agent {version}, pid {pid}, generation {generation}")?;
        }
        f.write_str(": both must allow")
    }
}

/// Hooks that every filter of ours has, and that no other software uses together.
const SIGNATURE: [Hook; 7] =
    [Hook::Connect4, Hook::Connect6, Hook::Sendmsg4, Hook::Sendmsg6, Hook::SockCreate, Hook::Recvmsg4, Hook::Recvmsg6];

/// Every other filter of ours on a cgroup and on those above it. `own` are the programs that are not of others.
pub fn find(mount: &Path, cgroup: &Path, own: &BTreeSet<u32>) -> io::Result<Vec<Other>> {
    let mut others = Vec::new();
    for path in below(cgroup).ancestors() {
        let directory = match File::open(mount.join(path)) {
            // One that is gone judges nobody.
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            directory => directory?,
        };
        let foreign = foreign(&directory, own)?;
        others.extend(sets(&foreign, &Path::new("/").join(path)));
    }
    Ok(others)
}

/// Whose programs are not our own, with the hook at which each was found first.
fn foreign(cgroup: &File, own: &BTreeSet<u32>) -> io::Result<BTreeMap<u32, Hook>> {
    let mut foreign = BTreeMap::new();
    // The kernel tells of programs for its security hooks by each hook of its own.
    for hook in Hook::ALL.iter().copied().filter(|&hook| hook != Hook::SocketCreate) {
        let ids = sys::programs(cgroup.as_fd(), attach_type(hook))?;
        for id in ids.into_iter().filter(|id| !own.contains(id)) {
            foreign.entry(id).or_insert(hook);
        }
    }
    Ok(foreign)
}

/// The filters that programs on one cgroup make up.
fn sets(foreign: &BTreeMap<u32, Hook>, cgroup: &Path) -> Vec<Other> {
    let cgroup = cgroup.display().to_string();
    let mut known = Vec::new();
    for &id in foreign.keys() {
        match sys::program(id) {
            Ok((name, maps)) => known.extend(hook(&name).map(|hook| (hook, maps))),
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => return guessed(foreign, cgroup),
            // It is gone, perhaps.
            Err(_) => {}
        }
    }
    let maps: BTreeSet<u32> = known.iter().flat_map(|(_, maps)| maps.iter().copied()).collect();
    let metas = maps.into_iter().filter_map(|id| Some((id, meta(id)?)));
    let sets = metas.map(|(id, meta)| {
        let shared: BTreeSet<u32> =
            known.iter().filter(|(_, maps)| maps.contains(&id)).flat_map(|(_, maps)| maps.clone()).collect();
        let is_of_set = |maps: &Vec<u32>| maps.iter().any(|id| shared.contains(id));
        let hooks: BTreeSet<&str> =
            known.iter().filter(|(_, maps)| is_of_set(maps)).map(|(hook, _)| hook.as_str()).collect();
        Other {
            cgroup: cgroup.clone(),
            pid: Some(meta.pid()),
            version: Some(meta.agent_version().to_owned()),
            generation: Some(meta.generation()),
            hooks: hooks.into_iter().map(str::to_owned).collect(),
        }
    });
    sets.collect()
}

/// What can be told without the privilege to ask whose programs these are.
fn guessed(foreign: &BTreeMap<u32, Hook>, cgroup: String) -> Vec<Other> {
    let hooks: BTreeSet<&str> = foreign.values().map(|hook| hook.as_str()).collect();
    let is_ours = SIGNATURE.iter().all(|hook| hooks.contains(hook.as_str()));
    let hooks = hooks.into_iter().map(str::to_owned).collect();
    is_ours.then_some(Other { cgroup, pid: None, version: None, generation: None, hooks }).into_iter().collect()
}

fn hook(program: &str) -> Option<Hook> {
    Hook::ALL.iter().copied().find(|hook| hook.as_str() == program)
}

/// What stands in a map, if it is the one that says who filled the others. Its first fields are the same in all versions.
fn meta(id: u32) -> Option<Meta> {
    let (name, element) = sys::first_element(id).ok().filter(|(_, element)| !element.is_empty())?;
    let mut bytes = [0_u8; size_of::<Meta>()];
    for (to, from) in bytes.iter_mut().zip(element) {
        *to = from;
    }
    (name == map::META).then(|| transmute!(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_the_privilege_only_our_combination_of_hooks_is_taken_for_ours() {
        let on =
            |hooks: &[Hook]| hooks.iter().enumerate().map(|(id, &hook)| (u32::try_from(id).unwrap(), hook)).collect();
        let guess = |hooks: &[Hook]| guessed(&on(hooks), "/a".to_owned()).len();
        assert_eq!(guess(Hook::ALL), 1);
        assert_eq!(guess(&SIGNATURE), 1);
        // Cilium's, and systemd's.
        assert_eq!(guess(&SIGNATURE.into_iter().filter(|&hook| hook != Hook::SockCreate).collect::<Vec<_>>()), 0);
        assert_eq!(guess(&[Hook::Egress, Hook::Ingress, Hook::SockCreate, Hook::Bind4, Hook::Bind6]), 0);
    }
}
