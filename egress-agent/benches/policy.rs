//! How long it takes to read, compile and ask large policies: `cargo bench --package egress-agent --bench policy`.
//!
//! Prints medians of several runs. What counts are the ratios between sizes and steps within one run.

use std::{
    fmt::Write,
    hint::black_box,
    net::Ipv4Addr,
    time::{Duration, Instant},
};

use egress_agent::{
    compile::{Context, NodeAction, NodeDefault, compile},
    policy::load::load_text,
    workload::Workload,
};
use egress_common::{Flow, Protocol};

const RUNS: usize = 5;
const SIZES: [u32; 4] = [100, 10_000, 100_000, 1_000_000];

fn main() {
    println!("{:>9} {:>9} {:>10} {:>10} {:>10} {:>9}", "prefixes", "kept", "read", "compile", "decide", "peak RSS");
    for size in SIZES {
        let text = document(size);
        let (read, loaded) = median(|| load_text("bench.yaml", &text));
        assert!(!loaded.has_errors(), "{:?}", loaded.findings.first());
        let node_default = NodeDefault { action: NodeAction::Deny, loopback: true, dns: true };
        let context = Context::new(node_default);
        let (compiled, ruleset) =
            median(|| compile(&loaded.policies, &Workload::default(), &context).expect("within the bounds"));
        let (decided, ()) = median(|| {
            for index in 0..100_000_u32 {
                let address = Ipv4Addr::from_bits(index.wrapping_mul(2_654_435_761)).into();
                let flow =
                    Flow { place: egress_agent::ruleset::Ruleset::PLACE, protocol: Protocol::TCP, address, port: 443 };
                let _ = black_box(ruleset.decide(&flow));
            }
        });
        let kept = ruleset.enforcing.entries().len();
        let each = decided.as_nanos() / 100_000;
        println!("{size:>9} {kept:>9} {read:>10.1?} {compiled:>10.1?} {each:>7} ns {:>6} MB", peak_rss());
    }
}

/// Entries of up to 1,000 addresses: each tenth a prefix, around some of the others, with ports of its own.
fn document(prefixes: u32) -> String {
    let mut text = String::new();
    for entry in 0..prefixes.div_ceil(1_000) {
        let _ = write!(
            text,
            "---\napiVersion: networking.istio.io/v1\nkind: ServiceEntry\nmetadata: {{name: e{entry}}}\nspec:\n  hosts: \
             [e{entry}.example.com]\n  ports: [{{number: 443, name: tls, protocol: TLS}}, {{number: {}, name: tcp}}]\n  \
             addresses:\n",
            1_000 + entry % 5_000
        );
        for index in entry * 1_000..prefixes.min((entry + 1) * 1_000) {
            // Spreads over the whole space, evenly and without repetition.
            let bits = index.wrapping_mul(2_654_435_761);
            let (address, length) = if index % 10 == 0 { (bits & !0xfff, 20) } else { (bits, 32) };
            let _ = writeln!(text, "  - {}/{length}", Ipv4Addr::from_bits(address));
        }
    }
    text
}

/// The median time of some runs, and the result of the last.
fn median<T>(mut work: impl FnMut() -> T) -> (Duration, T) {
    let mut times = Vec::new();
    let mut timed = || {
        let start = Instant::now();
        let result = work();
        times.push(start.elapsed());
        result
    };
    for _ in 1..RUNS {
        drop(timed());
    }
    let last = timed();
    times.sort_unstable();
    (times[RUNS / 2], last)
}

/// The most memory this process has had so far, in megabytes.
fn peak_rss() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap_or_default();
    line.split_ascii_whitespace().next().and_then(|kilobytes| kilobytes.parse::<u64>().ok()).unwrap_or_default() / 1_000
}
