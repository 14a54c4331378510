//! `EgressPolicy`.
use super::{
    EgressPolicy,
    decode::{Decoder, FieldPath},
    yaml::Node,
};
/// Reads.
pub fn decode(_: &mut Decoder<'_>, _: &Node<'_>, _: &FieldPath<'_>) -> Option<EgressPolicy> {
    None
}
