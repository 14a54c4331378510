//! From an edit to the policy in force: `cargo bench --package egress-tests --bench apply`, as root.
//!
//! Policies of several sizes; "first" is the first load, "edit" one address more. Each is split into what the agent does:
//! read (text to documents), compile, and apply (fill what is new, put it in its place, exchange; the last two wait for a grace
//! period of the kernel each). "grace" is the same for a policy of no size, measured in between: what no policy can do
//! without. Medians.

use std::{fmt::Write as _, fs, net::Ipv4Addr, sync::Arc, time::Instant};

use anyhow::{Context as _, Result, ensure};
use egress_agent::{
    compile::{Context, NodeAction, NodeDefault},
    dataplane::{Change, Dataplane, KernelLog, NameSettings, PacketGuard, pinned},
    pins::PinDirectory,
    policy::{PolicySet, load::load_text},
    scopes::{Node, Selector, UnknownWorkloads},
};
use egress_tests::bpffs::Bpffs;

const OBJECT: &str = match option_env!("EGRESS_EBPF_OBJECT") {
    Some(object) => object,
    None => concat!(env!("CARGO_MANIFEST_DIR"), "/../target/bpf/egress-ebpf.o"),
};

fn main() -> Result<()> {
    println!(
        "{:>9} {:>6} {:>9} {:>9} {:>9} {:>9} {:>9} {:>10} {:>9}",
        "prefixes", "", "read", "compile", "apply", "sum", "grace", "kernel MB", "peak MB"
    );
    for (size, rounds) in [(100, 31), (10_000, 31), (100_000, 7), (1_000_000, 3)] {
        let measured = measure(size, rounds)?;
        let (grace, kernel, peak) = (median(measured.grace), measured.bytes / 1_000_000, peak_memory()?);
        for (name, times) in [("first", measured.first), ("edit", measured.edit)] {
            let column = |of: fn(&Times) -> f64| median(times.iter().map(of).collect());
            let (read, compile, apply) = (column(|t| t.0), column(|t| t.1), column(|t| t.2));
            let sum = column(|t| t.0 + t.1 + t.2);
            println!(
                "{size:>9} {name:>6} {read:>8.1}m {compile:>8.1}m {apply:>8.1}m {sum:>8.1}m {grace:>8.1}m {kernel:>10} \
                 {peak:>9.0}"
            );
        }
    }
    Ok(())
}

/// Milliseconds to read, compile, and apply.
type Times = (f64, f64, f64);

#[derive(Default)]
struct Measured {
    first: Vec<Times>,
    edit: Vec<Times>,
    /// Milliseconds.
    grace: Vec<f64>,
    /// Of kernel memory.
    bytes: u64,
}

fn measure(size: u32, rounds: usize) -> Result<Measured> {
    let mut measured = Measured::default();
    for _ in 0..rounds {
        let bpffs = Bpffs::new()?;
        let directory = PinDirectory::claim(&bpffs.path().join("bench"))?;
        let mut dataplane = Dataplane::prepare(
            &fs::read(OBJECT)?,
            KernelLog::Off,
            PacketGuard::On,
            NameSettings::default(),
            directory.begin()?,
            u64::MAX,
        )?;
        measured.first.push(put(&mut dataplane, &document(size))?);
        measured.grace.push(put(&mut dataplane, "")?.2);
        put(&mut dataplane, &document(size))?;
        measured.edit.push(put(&mut dataplane, &document(size + 1))?);
        measured.bytes = pinned::map_uses(dataplane.pins().path())?.iter().map(|map| map.bytes).sum();
    }
    Ok(measured)
}

fn put(dataplane: &mut Dataplane, text: &str) -> Result<Times> {
    let start = Instant::now();
    let policies = read(text)?;
    let read = millis(start);
    let start = Instant::now();
    let node_default = NodeDefault { action: NodeAction::Deny, loopback: true, dns: true };
    let context = Context::new(node_default);
    let mut selector = Selector::new(Arc::new(policies), context, UnknownWorkloads::Deny, Vec::new());
    let layout = selector.layout(&[Node { id: 1, path: "bench".into() }], None)?;
    let compile = millis(start);
    let start = Instant::now();
    dataplane.apply(&layout, Change::Policy)?;
    let apply = millis(start);
    dataplane.clean();
    Ok((read, compile, apply))
}

fn read(text: &str) -> Result<PolicySet> {
    let loaded = load_text("bench.yaml", text);
    ensure!(!loaded.has_errors(), "{:?}", loaded.findings.first());
    Ok(loaded.policies)
}

fn millis(start: Instant) -> f64 {
    start.elapsed().as_secs_f64() * 1e3
}

fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

/// Of this process, so far, in megabytes.
fn peak_memory() -> Result<f64> {
    let status = fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).context("no VmHWM")?;
    Ok(line.trim().trim_end_matches(" kB").parse::<f64>()? / 1e3)
}

/// Entries of a thousand addresses that lie apart, so none is merged with another.
fn document(prefixes: u32) -> String {
    let mut text = String::new();
    for index in 0..prefixes {
        if index % 1000 == 0 {
            let _ = write!(
                text,
                "---\napiVersion: networking.istio.io/v1\nkind: ServiceEntry\nmetadata: {{ name: e{index} }}\nspec:\n  \
                 hosts: [e{index}.example.com]\n  ports: [{{ number: 443, name: tls, protocol: TLS }}]\n  addresses:\n"
            );
        }
        let _ = writeln!(text, "  - {}", Ipv4Addr::from_bits(0x0b00_0000 + index * 2));
    }
    text
}
