//! Messages of DNS, read as the kernel programs read them and as a resolver does.

use std::net::IpAddr;

use egress_common::{Bytes, EndOfName, NameKey, Question, Record, Response, end_of_name};
use hickory_proto::{
    op::{Message, MessageType, OpCode},
    rr::{DNSClass, RData},
};

/// What is learnt from a response.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Learnt {
    /// The name that was asked for, as a key: see [`NameKey`].
    pub name: Vec<u8>,
    /// Its addresses, in their order, with how many seconds they hold.
    pub addresses: Vec<(IpAddr, u32)>,
}

struct Datagram<'a>(&'a [u8]);

impl Bytes for Datagram<'_> {
    fn load<const N: usize>(&self, offset: u32) -> Option<[u8; N]> {
        self.0.get(offset as usize..)?.first_chunk().copied()
    }
}

impl egress_common::Message for Datagram<'_> {
    fn end_of_name(&self, offset: u32) -> EndOfName {
        end_of_name(self, offset)
    }
}

/// As the kernel programs do: up to what is malformed. `None` if nothing can be learnt from it.
pub fn learn(bytes: &[u8]) -> Option<Learnt> {
    let (message, mut key) = (Datagram(bytes), NameKey::EMPTY);
    let response = Response::read(&message)?;
    if !response.question.write_key(&message, &mut key) {
        return None;
    }
    let mut learnt = Learnt { name: key.as_bytes_of_name().to_vec(), addresses: Vec::new() };
    let mut offset = response.question.end();
    for _ in 0..response.answers {
        let Some(record) = Record::read(&message, offset) else { break };
        assert!(record.next > offset, "the next record is behind this one");
        learnt.addresses.extend(record.address.map(|address| (address.to_ip(), record.ttl)));
        offset = record.next;
    }
    Some(learnt)
}

/// The name that a query asks for, as a key, as the kernel programs read it. `None` if it is refused whatever it asks for.
pub fn asked(bytes: &[u8]) -> Option<Vec<u8>> {
    let (message, mut key) = (Datagram(bytes), NameKey::EMPTY);
    let question = Question::of_query(&message)?;
    question.write_key(&message, &mut key).then(|| key.as_bytes_of_name().to_vec())
}

/// Any bytes are read within their bounds, and where a resolver can read them, it finds the same.
pub fn dns_message(bytes: &[u8]) {
    let (learnt, asked) = (learn(bytes), asked(bytes));
    let Ok(message) = Message::from_vec(bytes) else { return };
    assert_eq!(learnt, expected(&message, bytes[3] & 0x0f));
    let is_question = message.answers.is_empty() && message.authorities.is_empty();
    let name = named(&message, MessageType::Query);
    assert_eq!(asked, name.filter(|_| is_question));
}

/// The key of the one name of a host that a message is about.
fn named(message: &Message, kind: MessageType) -> Option<Vec<u8>> {
    let [query] = message.queries.as_slice() else { return None };
    let is_of_kind = message.metadata.message_type == kind && message.metadata.op_code == OpCode::Query;
    let labels: Vec<&[u8]> = query.name().iter().collect();
    let is_plain = |label: &&[u8]| label.iter().all(|&byte| byte.is_ascii_alphanumeric() || b"-_".contains(&byte));
    if !is_of_kind || labels.is_empty() || !labels.iter().all(is_plain) {
        return None;
    }
    let mut name = labels.join(&b"."[..]).to_ascii_lowercase();
    name.reverse();
    name.push(0);
    Some(name)
}

/// The code is of the header alone: a resolver reads more of it from an EDNS record.
fn expected(message: &Message, code: u8) -> Option<Learnt> {
    let name = named(message, MessageType::Response).filter(|_| code == 0)?;
    let of_record = |record: &hickory_proto::rr::Record| {
        let address = match record.data {
            RData::A(address) => address.0.into(),
            RData::AAAA(address) => canonical(address.0.into()),
            _ => return None,
        };
        (record.dns_class == DNSClass::IN).then_some((address, if record.ttl >> 31 == 0 { record.ttl } else { 0 }))
    };
    Some(Learnt { name, addresses: message.answers.iter().filter_map(of_record).collect() })
}

/// An IPv4 address in an AAAA record is that address.
fn canonical(address: IpAddr) -> IpAddr {
    address.to_canonical()
}
