//! The agent: reads policies, compiles them, puts them in force, and reports what they refuse.
//!
//! Text becomes a [`policy::PolicySet`], that a [`ruleset::Ruleset`], and that the contents of kernel maps: one type
//! for each step. Only [`dataplane`] makes bpf calls; only the binary prints, exits and reads the environment.

mod attachment;
pub mod cgroup;
pub mod check;
pub mod cli;
pub mod compile;
pub mod dataplane;
pub mod events;
pub mod explain;
pub mod pins;
pub mod policy;
pub mod prefix;
mod report;
pub mod resolv;
pub mod resolver;
pub mod ruleset;
pub mod run;
mod source;
pub mod users;
mod watch;
pub mod workload;
