//! The hooks: each reads what is asked, asks, records, and answers.
//!
//! A hook runs for the sockets made in the attached cgroup or below; the acting task is the current one, but for packets,
//! which belong to the cgroup of their socket.

#![expect(clippy::needless_pass_by_value, reason = "the macros call each program with its context by value")]

mod answers;
mod binds;
mod cookie;
mod destinations;
mod options;
mod packets;
mod queries;
mod replies;
mod sockets;
