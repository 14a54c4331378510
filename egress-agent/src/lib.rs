//! The agent: reads policies, compiles them, puts them in force, and reports what they refuse.
//!
//! Text becomes a [`policy::PolicySet`], that a [`ruleset::Ruleset`], and that the contents of kernel maps: one type
//! for each step. Only [`dataplane`] makes bpf calls; only the binary prints, exits and reads the environment.

mod board;
pub mod cgroup;
pub mod check;
pub mod cli;
pub mod compile;
pub mod control;
pub mod dataplane;
mod enforcement;
pub mod events;
pub mod exec;
pub mod existing;
pub mod explain;
mod hierarchy;
pub mod kubernetes;
pub mod log;
mod memory;
mod mounts;
mod netns;
pub mod notify;
mod outlet;
pub mod pins;
pub mod pods;
pub mod policy;
pub mod prefix;
pub mod privileges;
mod processes;
mod report;
pub mod resolv;
pub mod resolver;
pub mod ruleset;
pub mod run;
pub mod scopes;
mod selection;
pub mod settings;
pub mod sock_diag;
pub mod socket_matching;
mod source;
pub mod status;
pub mod stop;
pub mod text;
pub mod users;
mod watch;
pub mod workload;
