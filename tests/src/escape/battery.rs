//! Runs every attempt, first without a filter and then with one, and says what each shows.

use std::{
    collections::BTreeMap,
    fmt, fs,
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Result, bail};

use super::{
    Act, Destinations, Place, Vector, Who,
    expectations::{closed_as_a_whole, documented},
    prisoner::{Attempt, Prisoner},
    sniffer::reaches,
    target::{NEAR4, NEAR6, OPEN, PORT, Permission, Target},
    vectors,
    yard::Yard,
};
use crate::{
    agent::Agent,
    cgroup::Cgroup,
    foreign::{Attached, Hook, How, Program},
};

/// How long the kernel may take for what it sends by itself after a call that went well.
const GRACE: Duration = Duration::from_millis(500);

/// What a case shows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// The packet arrived, and may.
    Allowed,
    /// The packet arrived, and must not.
    Leaked,
    /// Nothing arrived; what failed, if the sender was told.
    Blocked(String),
    /// Nothing arrives without a filter either; what failed.
    Unsupported(String),
    /// Nothing may leave and nothing did.
    Stayed,
    /// Without a filter it does not end as the table of vectors says, so the case shows nothing.
    Blind(String),
}

/// One row of the results.
#[derive(Debug, Clone)]
pub struct Case {
    /// How.
    pub vector: &'static Vector,
    /// By whom.
    pub who: Who,
    /// Where to.
    pub permission: Permission,
    /// What came of it.
    pub verdict: Verdict,
}

/// What an attempt did.
#[derive(Debug, Clone)]
struct Seen {
    arrived: bool,
    outcome: Result<(), String>,
}

/// A number for each attempt; it is in its addresses.
type Attempts = BTreeMap<u16, Attempt>;

/// Runs the attempts whose vectors have one of the words in their names; without words, all.
pub fn run(words: &[String]) -> Result<Vec<Case>> {
    let attempts = attempts(words);
    let mut grounds = Grounds::new()?;
    let open = grounds.round(&attempts, |_| Ok(None))?;
    let policies = tempfile::tempdir()?;
    fs::write(policies.path().join("policy.yaml"), policy())?;
    let closed = grounds.round(&attempts.iter().map(again).collect(), |cgroup| {
        Ok(Some(Agent::start(policies.path(), cgroup, &["--default", "Deny"])?))
    })?;
    Ok(attempts.iter().map(|(number, attempt)| judge(attempt, &open[number], &closed[number])).collect())
}

/// Added to the numbers of the second round.
const SECOND_ROUND: u16 = 0x2000;

/// The same attempt in the second round, with addresses of its own: the kernel may still send what the first left (MPTCP says for a
/// minute that it closes).
fn again((&number, attempt): (&u16, &Attempt)) -> (u16, Attempt) {
    let target = Target::new(SECOND_ROUND | number, attempt.target.permission());
    (number, Attempt { target, ..*attempt })
}

/// Opens one port of every form of an allowed destination, and this host, as a rule for a private network does.
fn policy() -> String {
    let to: Vec<String> = OPEN.iter().map(|prefix| format!("{{ cidr: '{prefix}' }}")).collect();
    format!(
        "apiVersion: egress.filter/v1alpha1\nkind: EgressPolicy\nmetadata: {{ name: escape }}\nspec:\n  \
         dns: {{ servers: None }}\n  allow:\n  - to: [{{ cidr: {NEAR4}/32 }}, {{ cidr: '{NEAR6}/128' }}]\n  - to: [{}]\n    \
         ports: [{{ port: {PORT} }}, {{ port: {PORT}, protocol: UDP }}]\n",
        to.join(", ")
    )
}

fn attempts(words: &[String]) -> Attempts {
    let chosen = |vector: &&Vector| words.is_empty() || words.iter().any(|word| vector.name.contains(word.as_str()));
    let mut attempts = Attempts::new();
    for vector in vectors::all().filter(chosen) {
        for who in [Who::Root, Who::User] {
            for permission in vector.permissions() {
                let number = u16::try_from(attempts.len() + 1).expect("there are fewer attempts than numbers");
                assert!(number < SECOND_ROUND, "each round has numbers of its own");
                attempts.insert(number, Attempt { vector, who, target: Target::new(number, *permission) });
            }
        }
    }
    attempts
}

/// Where the battery takes place.
struct Grounds {
    yard: Yard,
    outside: Cgroup,
}

/// The filtered cgroup and what is below it.
struct Prison {
    /// Dropped before the cgroup they are attached to.
    _programs: Vec<Attached>,
    cgroup: Cgroup,
    nested: Cgroup,
    threaded: Cgroup,
    _pool: Cgroup,
}

impl Prison {
    fn new() -> Result<Self> {
        let cgroup = Cgroup::new()?;
        let (nested, pool) = (cgroup.child("nested")?, cgroup.child("pool")?);
        let threaded = pool.child("threaded")?;
        threaded.make_threaded()?;
        let hooks = [Hook::Connect4, Hook::Connect6, Hook::Sendmsg4, Hook::Sendmsg6];
        let programs =
            hooks.into_iter().map(|hook| Program::pass(hook)?.attach(&nested, How::Multi)).collect::<Result<_, _>>()?;
        Ok(Self { _programs: programs, cgroup, nested, threaded, _pool: pool })
    }
}

impl Grounds {
    fn new() -> Result<Self> {
        Ok(Self { yard: Yard::new()?, outside: Cgroup::new()? })
    }

    /// Makes every attempt in a new cgroup; `filter` is called when those are ready that begin before it.
    fn round(
        &mut self,
        attempts: &Attempts,
        filter: impl FnOnce(&Cgroup) -> Result<Option<Agent>>,
    ) -> Result<BTreeMap<u16, Seen>> {
        let prison = Prison::new()?;
        let (early, late): (Vec<_>, Vec<_>) =
            attempts.iter().partition(|(_, attempt)| attempt.vector.place == Place::BeforeAttach);
        let mut waiting = Vec::new();
        for (number, attempt) in early {
            let mut prisoner = self.start(attempt, &prison)?;
            let prepared = prisoner.prepared()?;
            waiting.push((*number, attempt, prisoner, prepared));
        }
        self.yard.arrived()?;
        let _agent = filter(&prison.cgroup)?;
        let mut seen = BTreeMap::new();
        for (number, attempt, prisoner, prepared) in waiting {
            seen.insert(number, self.finish(attempt, prisoner, prepared)?);
        }
        for (number, attempt) in late {
            seen.insert(*number, self.attempt(attempt, &prison)?);
        }
        Ok(seen)
    }

    fn attempt(&mut self, attempt: &Attempt, prison: &Prison) -> Result<Seen> {
        let mut prisoner = self.start(attempt, prison)?;
        let mut prepared = prisoner.prepared()?;
        match attempt.vector.place {
            Place::MovedIn => prison.cgroup.take_process(prisoner.pid())?,
            Place::MovedOut => self.outside.take_process(prisoner.pid())?,
            Place::Announced => {
                let announced = self.yard.announce(attempt.target)?;
                prepared = prepared.and(announced.map_err(|error| format!("announcing: ENOENT ({error})")));
            }
            Place::Inside | Place::BeforeAttach | Place::Nested | Place::Threaded | Place::Elsewhere => (),
        }
        self.finish(attempt, prisoner, prepared)
    }

    fn start(&self, attempt: &Attempt, prison: &Prison) -> Result<Prisoner> {
        let cgroup = match attempt.vector.place {
            Place::MovedIn => &self.outside,
            Place::Nested => &prison.nested,
            Place::Threaded => &prison.threaded,
            Place::Inside | Place::MovedOut | Place::BeforeAttach | Place::Elsewhere | Place::Announced => {
                &prison.cgroup
            }
        };
        Prisoner::start(attempt, &self.yard.near, &self.yard.elsewhere, cgroup)
    }

    fn finish(&mut self, attempt: &Attempt, mut prisoner: Prisoner, prepared: Result<(), String>) -> Result<Seen> {
        // What arrived while it prepared was not sent by what is tried.
        if matches!(attempt.vector.act, Act::Twice(..)) {
            self.yard.arrived()?;
        }
        let outcome = match prepared {
            Ok(()) => prisoner.act()?,
            Err(error) => Err(error),
        };
        let mut arrived = self.has_reached(attempt.target)?;
        if outcome.is_ok() && attempt.vector.destinations != Destinations::Here {
            // The kernel may be about to send by itself, and tells nobody.
            let deadline = Instant::now() + GRACE;
            while !arrived && Instant::now() < deadline {
                sleep(GRACE / 20);
                arrived = self.has_reached(attempt.target)?;
            }
        }
        Ok(Seen { arrived, outcome })
    }

    fn has_reached(&mut self, target: Target) -> Result<bool> {
        Ok(self.yard.arrived()?.iter().any(|frame| reaches(frame, target)))
    }
}

fn judge(attempt: &Attempt, open: &Seen, closed: &Seen) -> Case {
    let Attempt { vector, who, target } = *attempt;
    let permission = target.permission();
    let verdict = if vector.destinations == Destinations::Here {
        if open.arrived || closed.arrived { Verdict::Leaked } else { Verdict::Stayed }
    } else {
        judge_by_arrival(attempt, open, closed)
    };
    Case { vector, who, permission, verdict }
}

fn judge_by_arrival(attempt: &Attempt, open: &Seen, closed: &Seen) -> Verdict {
    let Attempt { vector, who, target } = *attempt;
    let lacks_privilege = vector.root_only && who == Who::User;
    match (open.arrived, closed.arrived) {
        (true, _) if lacks_privilege => Verdict::Blind("an ordinary user can do it".to_owned()),
        (true, true) if target.permission() == Permission::Allowed => Verdict::Allowed,
        (true, true) => Verdict::Leaked,
        (true, false) => Verdict::Blocked(reason(closed)),
        (false, _) if lacks_privilege => Verdict::Unsupported(format!("needs root: {}", reason(open))),
        (false, _) => match vector.needs {
            Some(feature) if lacks(open) => Verdict::Unsupported(format!("needs {feature}: {}", reason(open))),
            _ => Verdict::Blind(reason(open)),
        },
    }
}

/// How a kernel says that it does not have something. Others, as that something is in use, are faults of the battery.
fn lacks(seen: &Seen) -> bool {
    let words = [
        "NOSUPPORT",
        "OPNOTSUPP",
        "NOPROTOOPT",
        "ENOSYS",
        "EINVAL",
        "ENODEV",
        "ENOENT",
        "EPERM",
        // Older kernels overlook the address of a `send`, and let no ring that polls use files it does not hold.
        "EDESTADDRREQ",
        "EBADF",
    ];
    seen.outcome.as_ref().is_err_and(|how| words.iter().any(|word| how.contains(word)))
}

fn reason(seen: &Seen) -> String {
    seen.outcome.clone().err().unwrap_or_else(|| "nothing was sent, and nobody told".to_owned())
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Allowed => f.write_str("allowed"),
            Self::Leaked => f.write_str("leaked"),
            Self::Blocked(how) => write!(f, "blocked ({how})"),
            Self::Unsupported(why) => write!(f, "unsupported ({why})"),
            Self::Stayed => f.write_str("stayed"),
            Self::Blind(how) => write!(f, "blind ({how})"),
        }
    }
}

/// What is wrong with the results: leaks that are not in the list, entries of the lists that do not hold, allowed
/// destinations that cannot be reached, and cases that show nothing.
pub fn faults(cases: &[Case]) -> Vec<String> {
    cases.iter().filter_map(|case| fault(case).map(|what| format!("{case}: {what}"))).collect()
}

fn fault(case: &Case) -> Option<&'static str> {
    let documented = documented(case.vector.name, case.who).is_some();
    let closed = closed_as_a_whole(case.vector.name).is_some();
    match (&case.verdict, case.permission) {
        (Verdict::Leaked, _) if !documented => Some("a leak that is not documented"),
        (Verdict::Blocked(_), Permission::Refused) if documented => Some("documented as a leak, and closed"),
        (Verdict::Blocked(_), Permission::Allowed) if !closed => Some("an allowed destination that cannot be reached"),
        (Verdict::Allowed, _) if closed => Some("listed as closed whatever its destination, and open"),
        (Verdict::Blind(_), _) => Some("does not show anything"),
        (Verdict::Stayed | Verdict::Unsupported(_) | Verdict::Leaked | Verdict::Allowed | Verdict::Blocked(_), _) => {
            None
        }
    }
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} | {} | {} | {}", self.vector.name, self.who, self.permission, self.verdict)
    }
}

/// Fails with everything that is wrong.
pub fn check(cases: &[Case]) -> Result<()> {
    let faults = faults(cases);
    if !faults.is_empty() {
        bail!("{} of {} cases are wrong:\n{}", faults.len(), cases.len(), faults.join("\n"));
    }
    Ok(())
}
