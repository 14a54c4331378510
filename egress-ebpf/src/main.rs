//! The kernel programs: hooks that ask [`egress_common::decide`], record the answer and give it.
//!
//! They hold no policy and decide nothing themselves. Each hook reads from its context what is asked, asks, counts, reports a
//! refusal, and answers; the maps live in the modules that own them.

#![no_std]
#![no_main]
#![cfg_attr(target_arch = "bpf", feature(asm_experimental_arch))]
#![expect(
    clippy::inline_always,
    reason = "the verifier follows one program: a call that is not inlined is a function of its own"
)]

mod answer;
mod asked;
mod atomic;
mod clock;
mod context;
mod events;
mod hooks;
mod lessons;
mod messages;
mod meta;
mod names;
mod packet;
mod peers;
mod questions;
mod rules;
mod stats;
mod workloads;

/// Names of these programs' licence; the helpers they call are reserved for GPL-compatible programs.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

#[cfg(not(test))]
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}
