//! The ways, by what they use. A way that leads to several places has a row for each.

mod datagram;
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
    [stream::VECTORS, datagram::VECTORS, uring::VECTORS, raw::VECTORS, routed::VECTORS, forged::VECTORS, held::VECTORS]
        .into_iter()
        .flatten()
}
