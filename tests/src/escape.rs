//! The escapee battery: every way by which a process can make this host send a packet off the machine, tried from inside a
//! filtered cgroup, against receivers that see whatever arrives.
//!
//! Each [`Vector`] is tried twice as root and twice as an ordinary user, for a destination that the policy names and for
//! one that it does not; first without a filter, which shows that the battery would see a leak, and then with one. What
//! it does not do: judge whether a way is worth closing. The list of those that are open and known is
//! [`expectations`].

pub mod battery;
pub mod expectations;
pub mod netlink;
pub mod prisoner;
pub mod sniffer;
pub mod sys;
pub mod table;
pub mod target;
pub mod vectors;
pub mod yard;

use std::{fmt, io, str::FromStr};

use target::{Permission, Target};

/// The call that failed, and how.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Step {
    /// Its name.
    pub call: &'static str,
    /// Its error number.
    pub errno: i32,
}

/// What came of an attempt, as the one who made it sees it.
pub type Outcome<T = ()> = Result<T, Step>;

impl Step {
    /// A call that failed.
    pub fn new(call: &'static str, error: &io::Error) -> Self {
        Self { call, errno: error.raw_os_error().unwrap_or(libc::EIO) }
    }
}

/// Who makes an attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Who {
    /// Root, with every capability.
    Root,
    /// An ordinary user without any.
    User,
}

/// A user who owns nothing.
pub const NOBODY: u32 = 65_534;

/// Where a prisoner is when it prepares, and when it acts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// In the filtered cgroup from the start.
    Inside,
    /// It prepares in another cgroup and is then moved inside.
    MovedIn,
    /// It prepares inside and is then moved to another cgroup.
    MovedOut,
    /// It prepares inside before the filter is attached.
    BeforeAttach,
    /// Below the filtered cgroup, in one with a program of its own that allows everything.
    Nested,
    /// In a threaded cgroup below the filtered one.
    Threaded,
    /// Inside, in another network namespace.
    Elsewhere,
    /// Inside, and the far namespace tells its MPTCP peers that it has the target's address, too.
    Announced,
}

/// Which destinations a vector can have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Destinations {
    /// Those that a policy allows, and others.
    Both,
    /// Only those that no policy can name.
    Refused,
    /// None off this machine: nothing may arrive, whether filtered or not.
    Here,
}

/// What is left to do.
pub type Rest = Box<dyn FnOnce() -> Outcome>;

/// What a prisoner does.
#[derive(Debug, Clone, Copy)]
pub enum Act {
    /// All at once.
    Once(fn(Target) -> Outcome),
    /// Something before it is moved, or before the filter is there, and the rest after that.
    Twice(fn(Target) -> Outcome<Rest>),
}

/// A way out.
#[derive(Debug, Clone, Copy)]
pub struct Vector {
    /// What it is called in tables.
    pub name: &'static str,
    /// Whether only root can go it.
    pub root_only: bool,
    /// What the kernel may lack, if it is not in every kernel.
    pub needs: Option<&'static str>,
    /// Where it can lead.
    pub destinations: Destinations,
    /// Where it is tried.
    pub place: Place,
    /// How.
    pub act: Act,
}

impl Vector {
    /// A way that everybody can go on every kernel.
    pub const fn new(name: &'static str, act: fn(Target) -> Outcome) -> Self {
        Self::with(name, Place::Inside, Act::Once(act))
    }

    /// A way in two steps.
    pub const fn prepared(name: &'static str, place: Place, prepare: fn(Target) -> Outcome<Rest>) -> Self {
        Self::with(name, place, Act::Twice(prepare))
    }

    const fn with(name: &'static str, place: Place, act: Act) -> Self {
        Self { name, root_only: false, needs: None, destinations: Destinations::Both, place, act }
    }

    /// Only root can go it.
    #[must_use]
    pub const fn root_only(self) -> Self {
        Self { root_only: true, ..self }
    }

    /// Some kernels lack it.
    #[must_use]
    pub const fn needs(self, feature: &'static str) -> Self {
        Self { needs: Some(feature), ..self }
    }

    /// No policy can name its destinations.
    #[must_use]
    pub const fn only_refused(self) -> Self {
        Self { destinations: Destinations::Refused, ..self }
    }

    /// It does not leave this machine.
    #[must_use]
    pub const fn stays_here(self) -> Self {
        Self { destinations: Destinations::Here, ..self }
    }

    /// It is tried somewhere else.
    #[must_use]
    pub const fn placed(self, place: Place) -> Self {
        Self { place, ..self }
    }

    /// What may be said of its destinations.
    pub fn permissions(&self) -> &'static [Permission] {
        match self.destinations {
            Destinations::Both => &[Permission::Allowed, Permission::Refused],
            Destinations::Refused | Destinations::Here => &[Permission::Refused],
        }
    }
}

impl fmt::Display for Who {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Root => "root",
            Self::User => "user",
        })
    }
}

impl fmt::Display for Permission {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Allowed => "allowed",
            Self::Refused => "refused",
        })
    }
}

impl FromStr for Who {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> anyhow::Result<Self> {
        match text {
            "root" => Ok(Self::Root),
            "user" => Ok(Self::User),
            other => anyhow::bail!("nobody is {other}"),
        }
    }
}

impl FromStr for Permission {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> anyhow::Result<Self> {
        match text {
            "allowed" => Ok(Self::Allowed),
            "refused" => Ok(Self::Refused),
            other => anyhow::bail!("a destination is allowed or refused, not {other}"),
        }
    }
}
