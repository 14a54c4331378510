//! What the kernel programs read in questions to DNS servers and in their answers, beside what a resolver's library wrote into them.

#![allow(clippy::unwrap_used, reason = "a test ends where it cannot go on")]

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use egress_common::{NameEnd, NameKey};
use egress_tests::fuzz_targets::dns::{Learnt, asked, dns_message, learn};
use hickory_proto::{
    op::{Edns, Message, OpCode, Query},
    rr::{
        Name, RData, Record, RecordType,
        rdata::{A, AAAA, CNAME, TXT},
    },
};
use proptest::prelude::*;

/// Something that stands in an answer.
#[derive(Debug, Clone)]
enum Part {
    Alias(String),
    Address(IpAddr),
    Text(String),
}

fn part() -> impl Strategy<Value = Part> {
    prop_oneof![
        1 => name().prop_map(Part::Alias),
        4 => any::<Ipv4Addr>().prop_map(|address| Part::Address(address.into())),
        4 => any::<Ipv6Addr>().prop_map(|address| Part::Address(IpAddr::from(address).to_canonical())),
        1 => "[ -~]{0,200}".prop_map(Part::Text),
    ]
}

fn name() -> impl Strategy<Value = String> {
    "[a-zA-Z0-9_-]{1,63}(\\.[a-zA-Z0-9_-]{1,20}){0,6}"
}

/// As a server writes it: names that were written before are pointers.
fn written(question: &str, parts: &[(Part, u32)], has_edns: bool) -> Message {
    let name = |text: &str| Name::from_labels(text.split('.').map(str::as_bytes)).unwrap();
    let mut message = Message::response(1, OpCode::Query);
    message.add_query(Query::query(name(question), RecordType::A));
    let mut owner = name(question);
    for (part, ttl) in parts {
        let data = match part {
            Part::Alias(to) => RData::CNAME(CNAME(name(to))),
            Part::Address(IpAddr::V4(address)) => RData::A(A(*address)),
            Part::Address(IpAddr::V6(address)) => RData::AAAA(AAAA(*address)),
            Part::Text(text) => RData::TXT(TXT::new(vec![text.clone()])),
        };
        message.add_answer(Record::from_rdata(owner.clone(), *ttl, data));
        if let Part::Alias(to) = part {
            owner = name(to);
        }
    }
    message.edns = has_edns.then(Edns::new);
    message
}

proptest! {
    /// And whatever is damaged in it, a server that can read it reads the same.
    #[test]
    fn what_a_client_asks_for_is_judged_as_it_was_meant(
        question in name(),
        has_edns: bool,
        (at, value) in any::<(prop::sample::Index, u8)>(),
    ) {
        let mut message = Message::query();
        let name = Name::from_labels(question.split('.').map(str::as_bytes)).unwrap();
        message.add_query(Query::query(name, RecordType::AAAA));
        message.edns = has_edns.then(Edns::new);
        let mut bytes = message.to_vec().unwrap();
        let name = NameKey::of(&question, NameEnd::Exact).unwrap().as_bytes_of_name().to_vec();
        prop_assert_eq!(asked(&bytes), Some(name));
        let at = at.index(bytes.len());
        bytes[at] = value;
        dns_message(&bytes);
    }

    #[test]
    fn what_a_server_writes_is_learnt_as_it_was_meant(
        question in name(),
        parts in prop::collection::vec((part(), 0..1_u32 << 31), 0..60),
        has_edns: bool,
    ) {
        let bytes = written(&question, &parts, has_edns).to_vec().unwrap();
        let addresses = parts.iter().filter_map(|(part, ttl)| match part {
            Part::Address(address) => Some((*address, *ttl)),
            Part::Alias(_) | Part::Text(_) => None,
        });
        let name = NameKey::of(&question, NameEnd::Exact).unwrap().as_bytes_of_name().to_vec();
        prop_assert_eq!(learn(&bytes), Some(Learnt { name, addresses: addresses.collect() }));
    }

    /// One byte is another, or the end is missing: whatever a resolver still reads, it reads alike.
    #[test]
    fn what_was_damaged_is_read_as_a_resolver_reads_it(
        question in name(),
        parts in prop::collection::vec((part(), 0..1_u32 << 31), 0..6),
        (at, value) in any::<(prop::sample::Index, u8)>(),
        cut in any::<prop::sample::Index>(),
    ) {
        let bytes = written(&question, &parts, false).to_vec().unwrap();
        let mut damaged = bytes.clone();
        damaged[at.index(bytes.len())] = value;
        dns_message(&damaged);
        dns_message(&bytes[..cut.index(bytes.len())]);
    }
}
