//! What holds for a view beside the rules of its trie.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::{Action, SocketKinds, UnknownCode, coded_enum};

coded_enum! {
    /// What a refused call returns.
    pub enum Refusal {
        /// Operation not permitted.
        Eperm = 0 => "EPERM",
        /// As if nobody listened there.
        Econnrefused = 1 => "ECONNREFUSED",
        /// As if there were no way to the host.
        Ehostunreach = 2 => "EHOSTUNREACH",
    }
}

impl Refusal {
    /// The number in `asm-generic/errno.h`.
    #[inline(always)]
    pub const fn errno(self) -> i32 {
        match self {
            Self::Eperm => 1,
            Self::Econnrefused => 111,
            Self::Ehostunreach => 113,
        }
    }
}

/// An element of the `VIEWS` map. All zeros is a view that is not there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Settings {
    flags: u8,
    default: u8,
    replies: u8,
    refusal: u8,
    sockets: u16,
    reserved: [u8; 2],
}

/// There is such a view.
const THERE: u8 = 1;
/// Its workloads resolve names for the whole host.
const DNS_SERVICE: u8 = 1 << 1;
/// They may ask only for names that rules know.
const NAMED_QUERIES: u8 = 1 << 2;
/// Its rules name names.
const NAMES: u8 = 1 << 3;

impl Settings {
    /// The element of a view that is not there.
    pub const ABSENT: Self = Self { flags: 0, default: 0, replies: 0, refusal: 0, sockets: 0, reserved: [0; 2] };

    /// With this default; replies are allowed, sockets beyond TCP and UDP are not, and refused calls return `EPERM`.
    pub const fn new(default: Action) -> Self {
        Self { flags: THERE, default: default.code(), replies: Action::Allow.code(), ..Self::ABSENT }
    }

    #[inline(always)]
    const fn with(self, flag: u8) -> Self {
        Self { flags: self.flags | flag, ..self }
    }

    #[inline(always)]
    const fn has(self, flag: u8) -> bool {
        self.flags & flag != 0
    }

    /// With this answer to datagrams back to a peer that the socket has received from.
    #[must_use]
    pub const fn with_replies(self, replies: Action) -> Self {
        Self { replies: replies.code(), ..self }
    }

    /// With these kinds of socket beyond TCP and UDP.
    #[must_use]
    pub const fn with_sockets(self, sockets: SocketKinds) -> Self {
        Self { sockets: sockets.field(), ..self }
    }

    /// With this return value of refused calls.
    #[must_use]
    pub const fn with_refusal(self, refusal: Refusal) -> Self {
        Self { refusal: refusal.code(), ..self }
    }

    /// Of workloads that resolve names for the whole host.
    #[must_use]
    pub const fn with_dns_service(self) -> Self {
        self.with(DNS_SERVICE)
    }

    /// Of workloads that may ask servers of DNS only for names that rules know.
    #[must_use]
    pub const fn with_named_queries(self) -> Self {
        self.with(NAMED_QUERIES)
    }

    /// Beside rules that name names.
    #[must_use]
    pub const fn with_names(self) -> Self {
        self.with(NAMES)
    }

    /// Whether its workloads resolve names for the whole host: they may serve DNS, and what they learn counts for everybody.
    #[inline(always)]
    pub const fn serves_dns(&self) -> bool {
        self.has(DNS_SERVICE)
    }

    /// Whether its workloads may ask servers of DNS only for names that rules know.
    #[inline(always)]
    pub const fn asks_only_named(&self) -> bool {
        self.has(NAMED_QUERIES)
    }

    /// Whether its rules name names, so that it matters what was learnt of them.
    #[inline(always)]
    pub const fn has_names(&self) -> bool {
        self.has(NAMES)
    }

    /// Whether there is such a view.
    #[inline(always)]
    pub const fn is_there(&self) -> bool {
        self.has(THERE)
    }

    /// What happens to what no rule names.
    #[inline(always)]
    pub fn default_action(&self) -> Result<Action, UnknownCode> {
        self.default.try_into()
    }

    /// What happens to datagrams back to a peer that the socket has received from.
    #[inline(always)]
    pub fn replies(&self) -> Result<Action, UnknownCode> {
        self.replies.try_into()
    }

    /// Kinds of socket that may be made, beyond TCP and UDP.
    #[inline(always)]
    pub const fn sockets(&self) -> SocketKinds {
        SocketKinds::from_field(self.sockets)
    }

    /// What refused calls return.
    #[inline(always)]
    pub fn refusal(&self) -> Result<Refusal, UnknownCode> {
        self.refusal.try_into()
    }
}

const _: () = assert!(size_of::<Settings>() == 8);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::SocketKind;

    #[test]
    fn settings_give_back_what_was_put_in() {
        let sockets = SocketKinds::default().with(SocketKind::Icmp);
        let settings = Settings::new(Action::Deny)
            .with_replies(Action::Deny)
            .with_sockets(sockets)
            .with_refusal(Refusal::Ehostunreach);
        let settings = Settings::read_from_bytes(settings.as_bytes()).unwrap();
        assert!(settings.is_there() && !Settings::ABSENT.is_there());
        assert_eq!((settings.default_action(), settings.replies()), (Ok(Action::Deny), Ok(Action::Deny)));
        assert_eq!((settings.sockets(), settings.refusal()), (sockets, Ok(Refusal::Ehostunreach)));
        assert_eq!(Settings::new(Action::Allow).replies(), Ok(Action::Allow));
        assert!(settings.with_dns_service().serves_dns() && !settings.serves_dns());
        assert!(settings.with_named_queries().asks_only_named() && !settings.asks_only_named());
        assert!(settings.with_names().has_names() && !settings.has_names());
    }
}
