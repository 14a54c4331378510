//! The ways, by what they use. A way that leads to several places has a row for each.

mod datagram;
mod express;
mod forged;
mod held;
mod raw;
mod routed;
mod stream;
mod uring;

pub use held::use_inherited;

use super::Vector;

/// Every way.
pub fn all() -> impl Iterator<Item = &'static Vector> {
    [
        stream::VECTORS,
        datagram::VECTORS,
        uring::VECTORS,
        raw::VECTORS,
        express::VECTORS,
        routed::VECTORS,
        forged::VECTORS,
        held::VECTORS,
    ]
    .into_iter()
    .flatten()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::escape::expectations::DOCUMENTED;

    #[test]
    fn no_two_ways_have_one_name() {
        let mut names = BTreeSet::new();
        all().for_each(|vector| assert!(names.insert(vector.name), "{} is there twice", vector.name));
    }

    #[test]
    fn what_is_documented_is_tried() {
        for known in DOCUMENTED {
            assert!(all().any(|vector| vector.name.starts_with(known.vector)), "nobody tries {}", known.vector);
        }
    }

    #[test]
    fn what_is_documented_stands_in_the_guarantees() {
        let page = include_str!("../../../GUARANTEES.md");
        for known in DOCUMENTED {
            assert!(page.contains(&format!("\n| {}", known.row)), "no row begins with {}", known.row);
        }
    }
}
