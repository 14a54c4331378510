//! What the kernel programs and the agent share: the types that cross between them, and the decision.
//!
//! [`decide`] answers every question, in the kernel, in `explain` and in tests: a pure function of the rules it is
//! given and the flow it is asked about. Every byte that the kernel programs and the agent exchange is defined here,
//! once, with private fields and without padding.
//!
//! This crate is *not* the place for policy: it knows neither documents nor names, and it never allocates, does
//! input or output, or reads a clock.

#![no_std]
#![expect(
    clippy::inline_always,
    reason = "a function that the BPF compiler does not inline enters the type information, and the kernel refuses the \
              types of Rust enums there"
)]

mod address;
mod decide;
mod dns;
mod event;
mod flow;
mod layout;
mod names;
mod packet;
mod peers;
mod reserved;
mod rule;
mod settings;
mod socket;
mod stream;
mod verdict;
mod workload;

pub use address::{Address, PrefixKey};
pub use decide::{
    NamedRules, Queries, Rules, decide, decide_bypass, decide_dns_service, decide_query, decide_socket, find_segment,
    queries, remembers_peers, rule_by_name, serves_dns,
};
pub use dns::{EndOfName, KEY_BYTES, Message, NameEnd, NameKey, Question, Record, Response, end_of_name};
pub use event::{COMM_LEN, Event, LEVELS, Lineage, Process, QueryEvent, Questioner, Share};
pub use flow::{Flow, Hook, Protocol, Scope, View};
pub use layout::{
    ABI_VERSION, Counter, MAX_FACTS, MAX_HOSTS, MAX_LEARNERS, MAX_NETNS, MAX_RESOLVERS, MAX_SCOPES, MAX_SHARES,
    MAX_USERS, Meta, map,
};
pub use names::{
    Account, Asked, COMMON, COMMON_FACTS, Claim, ClaimPlace, Claims, FactKey, Fit, Lesson, Lifetime, MOST_CLAIMS,
    NameId, ResolverKey, guaranteed,
};
pub use packet::{
    Arrived, Bytes, Checksum, DNS_PORT, Packet, Sent, Way, answer_v4, answer_v6, sent_v4, sent_v6, way_v4, way_v6,
};
pub use peers::{MAX_PEERS, Peers, REPLY_SECONDS};
pub use reserved::Reserved;
pub use rule::{Action, Entries, Entry, RuleId, Segment, SegmentList};
pub use settings::{Refusal, Settings};
pub use socket::{SocketKind, SocketKinds};
pub use stream::{Arrival, Framed, LONGEST_MESSAGE, MOST_AT_ONCE, Step, Stream, framed};
pub use verdict::{Decision, Reason, Verdict};
pub use workload::{ELSEWHERE, MAX_LEVEL, Place, Placement, SHARED, Seat, Task, UserKey, Workloads, place, workload};

/// A byte that stands for no value of the enum it was read as: written by another version, or damaged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UnknownCode(pub u8);

/// Gives a field-less enum its codes: `u8` out, `TryFrom<u8>` back in, and one name for logs, metrics and documents.
macro_rules! coded_enum {
    ($(#[$meta:meta])* $vis:vis enum $name:ident { $($(#[$variant_meta:meta])* $variant:ident = $code:literal => $text:literal,)+ }) => {
        $(#[$meta])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[repr(u8)]
        $vis enum $name { $($(#[$variant_meta])* $variant = $code,)+ }

        impl $name {
            /// Every value, in the order of the codes.
            pub const ALL: &'static [Self] = &[$(Self::$variant),+];

            /// The one name of this value in logs, events, metrics and documents.
            pub const fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $text,)+ }
            }

            /// The byte that stands for this value in shared layouts; never given to another value.
            pub const fn code(self) -> u8 {
                self as u8
            }
        }

        impl TryFrom<u8> for $name {
            type Error = $crate::UnknownCode;

            fn try_from(code: u8) -> Result<Self, Self::Error> {
                match code { $($code => Ok(Self::$variant),)+ other => Err($crate::UnknownCode(other)) }
            }
        }
    };
}
pub(crate) use coded_enum;
