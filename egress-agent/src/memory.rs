//! Memory of rules that are gone is given back to the kernel.

/// So many prefixes take little memory.
const SMALL: usize = 10_000;

/// What the rules in force take, as far as it matters here.
#[derive(Debug, Default)]
pub(crate) struct Heap {
    prefixes: usize,
    is_smaller: bool,
}

impl Heap {
    /// Rules with so many prefixes are in force.
    pub(crate) fn holds(&mut self, prefixes: usize) {
        self.is_smaller |= prefixes.saturating_mul(2) + SMALL < self.prefixes;
        self.prefixes = prefixes;
    }

    /// Gives back what is free, if much of it is. The allocator keeps it where something small that came later lies behind it.
    pub(crate) fn give_back(&mut self) {
        if !std::mem::take(&mut self.is_smaller) {
            return;
        }
        #[cfg(target_env = "gnu")]
        // SAFETY: it concerns memory that is free alone, and may be called at any time.
        unsafe {
            libc::malloc_trim(0);
        }
    }
}

/// Lets all threads allocate from one heap: policies are read and compiled on threads that come and go, and what is free at the end
/// of a heap of their own is never given back. They hardly ever work at the same time. To be called before there are threads.
pub(crate) fn share_one_heap() {
    #[cfg(target_env = "gnu")]
    // SAFETY: it sets a number, and no other thread allocates yet.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_given_back_when_most_prefixes_are_gone() {
        let mut heap = Heap::default();
        for (prefixes, is_smaller) in [(300_000, false), (200_000, false), (10, true), (300_000, true), (20, true)] {
            heap.holds(prefixes);
            assert_eq!(heap.is_smaller, is_smaller, "{prefixes}");
        }
        heap.give_back();
        assert!(!heap.is_smaller);
    }
}
