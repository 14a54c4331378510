//! What it costs to learn names: `cargo bench --package egress-tests --bench names`, as root, with `EGRESS_AGENT` naming the
//! built agent.
//!
//! The same process exchanges packets with the same servers: without a filter, behind a program that looks at no packet, behind a
//! filter whose policy names no names, behind one that does, and behind one that also judges questions. The cases take turns in each round; printed are the medians, and
//! the median of what a round added to its unfiltered case.

use std::fs;

use anyhow::Result;
use egress_tests::{
    agent::{Agent, Place, run_command},
    asker::{self, Asker, Heard},
    cgroup::Cgroup,
    foreign::{Hook, How, Program},
    netns::Netns,
};

const ROUNDS: usize = 51;
const SERVER: &str = "127.0.0.9";
/// A name that no policy has.
const UNKNOWN: &str = "198-18-0-1.example.org";

fn main() -> Result<()> {
    let namespace = Netns::new()?;
    let server = SERVER.parse()?;
    namespace.run(|| asker::serve(server, &Heard::default()).and_then(|()| asker::echo(server)))??;
    let cgroups = [Cgroup::new()?, Cgroup::new()?, Cgroup::new()?, Cgroup::new()?, Cgroup::new()?];
    let _empty = Program::pass(Hook::Ingress)?.attach(&cgroups[1], How::Link)?;
    let mut agents = Vec::new();
    for (cgroup, to, queries) in [
        (&cgroups[2], "cidr: 192.0.2.0/24", "Any"),
        (&cgroups[3], "host: '*.example.com'", "Any"),
        (&cgroups[4], "host: '*.example.com'", "Named"),
    ] {
        let (policies, place) = (tempfile::tempdir()?, Place::new()?);
        fs::write(
            policies.path().join("policy.yaml"),
            format!(
                "apiVersion: egress.filter/v1alpha1\nkind: EgressPolicy\nmetadata: {{ name: p }}\n\
                 spec: {{ dns: {{ servers: [{SERVER}], queries: {queries} }}, allow: [ {{ to: [ {{ {to} }} ] }} ] }}\n"
            ),
        )?;
        let run = run_command(policies.path(), cgroup.path(), &[])?;
        let mut command = namespace.command(run.get_program(), None)?;
        command.args(run.get_args());
        let mut agent = Agent::spawn_in(Some(&place), command)?;
        agent.wait_for("policy applied generation=1 ")?;
        agents.push((agent, place, policies));
    }
    let mut askers = Vec::new();
    for cgroup in &cgroups {
        askers.push(Asker::start(&namespace, cgroup)?);
    }
    println!("{:<44} {:>9} {:>8} {:>8} {:>8} {:>8}", "ns", "no filter", "empty", "filter", "names", "judged");
    for (what, order, name, count) in [
        ("a datagram and its echo", "datagrams", "-", 5_000),
        ("a byte by TCP and its echo", "bytes", "-", 5_000),
        ("256 KiB by TCP and their echo", "bulk", "-", 20),
        ("a question and its answer, one address", "answers", "198-18-0-1.example.com", 5_000),
        ("the same of a name that no policy has", "answers", UNKNOWN, 5_000),
        ("a question and its answer, 100 addresses", "answers", "many-100.example.com", 2_000),
    ] {
        let mut rounds = Vec::new();
        for _ in 0..ROUNDS {
            let mut round = [f64::NAN; 5];
            // A question that is refused has no answer.
            let cases = if name == UNKNOWN { 4 } else { 5 };
            for (time, asker) in round.iter_mut().zip(&mut askers).take(cases) {
                *time = asker.time(order, count, server, name)?;
            }
            rounds.push(round);
        }
        let median = |of: &dyn Fn(&[f64; 5]) -> f64| {
            let mut times: Vec<f64> = rounds.iter().map(of).collect();
            times.sort_by(f64::total_cmp);
            times[times.len() / 2]
        };
        let added = |case: usize| median(&|round| round[case] - round[0]);
        println!(
            "{what:<44} {:>9.0} {:>+8.0} {:>+8.0} {:>+8.0} {:>+8.0}   x{:.3} x{:.3}",
            median(&|round| round[0]),
            added(1),
            added(2),
            added(3),
            added(4),
            median(&|round| round[3] / round[2]),
            median(&|round| round[4] / round[2])
        );
    }
    drop(agents);
    Ok(())
}
