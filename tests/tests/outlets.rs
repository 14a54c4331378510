//! Nobody behind a pipe stops the agent, each denial is written or counted, and what others have put into a name is harmless to
//! whoever reads it.

#![allow(clippy::unwrap_used, reason = "a test ends where it cannot go on")]

use std::{
    fs::{self, File},
    io::{BufRead, BufReader, Read},
    os::unix::fs::OpenOptionsExt,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use egress_tests::{
    agent::{Agent, binary, run_command},
    dial::{Call, Dialer, Method, Timed},
    eventually,
    flood::{Neighbour, piped},
    program,
    world::World,
};
use rustix::{
    fs::{CWD, FileType, Mode, OFlags, mknodat},
    process::{Pid, Signal, kill_process},
};
use serde_json::Value;

const ONE: &str = "192.0.2.1";

/// Escape sequences, ends of lines, DEL, C1 and text turned around.
const HOSTILE: &str = "a\u{1b}[31m\n\u{7f}\u{9b}1m\u{202e}b";

fn is_harmless(text: &str) -> bool {
    let turns = |c| matches!(c, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    !text.chars().any(|c| (c.is_control() && c != '\n') || turns(c))
}

/// Strings as `jq -r` prints them.
fn strings(value: &Value) -> Vec<&str> {
    match value {
        Value::String(text) => vec![text],
        Value::Array(values) => values.iter().flat_map(strings).collect(),
        Value::Object(fields) => fields.values().flat_map(strings).collect(),
        Value::Null | Value::Bool(_) | Value::Number(_) => Vec::new(),
    }
}

fn refuse(world: &mut World, times: u32) {
    let call = Call { method: Method::UdpConnect, mapped: false, to: "192.0.2.2:80".parse().unwrap() };
    world.dialer.time(Timed::Connect, &call, times).unwrap();
}

/// Denials that were written and lost, by what `status` tells.
fn told(status: &Value) -> (u64, u64) {
    let lost = status["reports"]["lost"].as_array().unwrap();
    let lost = lost.iter().map(|loss| loss["count"].as_u64().unwrap()).sum();
    assert_eq!(status["counters"]["events_lost"], lost, "{status:#}");
    (status["reports"]["written"].as_u64().unwrap(), lost)
}

/// Waits until so many denials are written or lost.
fn wait_until_told(world: &World, all: u64) -> Value {
    eventually("all denials in `status`", || {
        let status = world.place.status().unwrap().1;
        let (written, lost) = told(&status);
        (written + lost == all).then_some(status)
    })
    .unwrap()
}

fn term(child: &Child) {
    let pid = Pid::from_raw(i32::try_from(child.id()).unwrap()).unwrap();
    kill_process(pid, Signal::TERM).unwrap();
}

/// A pipe with a name can lose its reader, and get another.
#[test]
fn a_reader_that_leaves_ends_no_reports_and_the_next_gets_them() {
    let mut world = World::opening(&[ONE]).unwrap();
    let directory = tempfile::tempdir().unwrap();
    let fifo = directory.path().join("denials");
    mknodat(CWD, &fifo, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
    let open = || {
        let nonblock = i32::try_from(OFlags::NONBLOCK.bits()).unwrap();
        File::options().read(true).custom_flags(nonblock).open(&fifo).unwrap()
    };
    let first = open();
    let mut command = world.command(&[]).unwrap();
    world.place.tell(&mut command);
    command.stdin(Stdio::null()).stdout(File::options().write(true).open(&fifo).unwrap()).stderr(Stdio::piped());
    let mut agent = command.spawn().unwrap();
    let mut log = BufReader::new(agent.stderr.take().unwrap()).lines().map(Result::unwrap);
    assert!(log.any(|line| line.contains("policy applied generation=1 ")));
    refuse(&mut world, 10);
    wait_until_told(&world, 10);
    drop(first);
    refuse(&mut world, 5_110);
    let status = wait_until_told(&world, 5_120);
    assert_eq!(told(&status), (10, 5_110));
    let loss = &status["reports"]["lost"][0];
    assert_eq!((&loss["cgroup"], &loss["stage"]), (&world.cgroup.name().into(), &"output".into()));
    assert!(status["degraded"].to_string().contains("denials cannot be written"), "{status:#}");
    assert_eq!(world.place.status().unwrap().0, Some(1));

    let mut second = open();
    refuse(&mut world, 1);
    assert_eq!(told(&wait_until_told(&world, 5_121)), (11, 5_110));
    assert_eq!(world.place.status().unwrap().0, Some(0));
    let mut read = [0; 4096];
    let length = second.read(&mut read).unwrap();
    let line = std::str::from_utf8(&read[..length]).unwrap();
    assert!(line.contains(&world.cgroup.name()), "{line}");
    term(&agent);
    assert_eq!(agent.wait().unwrap().code(), Some(0));
    let rest: Vec<String> = log.collect();
    assert_eq!(rest.iter().filter(|line| line.contains("nobody reads stdout any more")).count(), 1, "{rest:#?}");
}

/// The numbers after `lost=` in lines of a log, of those that the agent lost.
fn lost_of(log: &[String]) -> u64 {
    let number = |line: &String| line.split("lost=").nth(1)?.split_whitespace().next()?.parse::<u64>().ok();
    let told = |line: &&String| line.contains("not reported") && !line.contains("ring buffer");
    log.iter().filter(told).filter_map(number).sum()
}

#[test]
fn each_denial_is_written_or_counted_where_nobody_reads() {
    let mut world = World::opening(&[ONE]).unwrap();
    let mut command = world.command(&[]).unwrap();
    world.place.tell(&mut command);
    let mut agent = piped(command).unwrap();
    let mut log = BufReader::new(agent.stderr.take().unwrap()).lines().map(Result::unwrap);
    assert!(log.any(|line| line.contains("policy applied generation=1 ")));
    refuse(&mut world, 50_000);
    let asked = Instant::now();
    term(&agent);
    assert_eq!(agent.wait().unwrap().code(), Some(0));
    assert!(asked.elapsed() < Duration::from_secs(5), "{:?}", asked.elapsed());
    let mut text = String::new();
    agent.stdout.take().unwrap().read_to_string(&mut text).unwrap();
    let log: Vec<String> = log.collect();
    // What the kernel dropped, and what it still holds, which the next agent reports.
    let dropped = world.place.status().unwrap().1["counters"]["events_lost"].as_u64().unwrap();
    let (_, denials, next) = world.start(&[]).unwrap().stop().unwrap();
    let in_ring = denials.len() as u64 + lost_of(&next);
    assert_eq!(text.lines().count() as u64 + in_ring + lost_of(&log) + dropped, 50_000, "{log:#?}");
    assert!(text.lines().count() > 50 && lost_of(&log) + dropped > 10_000);
}

/// An invalid policy, of which each start and each change tells more than a pipe holds.
fn endless_complaints() -> String {
    let one =
        "---\napiVersion: egress.filter/v1alpha1\nkind: EgressPolicy\nmetadata: { name: p }\nspec: { nonsense: 1 }\n";
    one.repeat(1_000)
}

#[test]
fn a_log_that_nobody_reads_stops_no_change_of_policy_no_status_and_no_end() {
    let mut world = World::opening(&[ONE]).unwrap();
    let mut command = world.command(&[]).unwrap();
    world.place.tell(&mut command);
    let mut agent = piped(command).unwrap();
    let mut stderr = agent.stderr.take().unwrap();
    eventually("the agent", || world.place.status().ok().filter(|(code, _)| *code == Some(0))).unwrap();
    let complaints = endless_complaints();
    for round in 0..20 {
        world.write(&format!("{complaints}# {round}\n")).unwrap();
        assert!(world.place.reload().is_err());
    }
    world.open_only(&["192.0.2.9"]).unwrap();
    assert_eq!(world.place.reload().unwrap(), 2);
    assert!(world.is_open("192.0.2.9").unwrap() && !world.is_open(ONE).unwrap());
    let status = world.place.status().unwrap().1;
    assert!(status["log_lost"].as_u64().unwrap() > 0, "{status:#}");
    assert!(status["degraded"].to_string().contains("nobody reads stderr"), "{status:#}");

    // Who comes to read is told what is missing.
    let mut log = BufReader::new(&mut stderr).lines().map(Result::unwrap);
    assert!(log.any(|line| line.contains("lines of the log were lost") && line.contains("WARN")));
    eventually("a status that is well", || (world.place.status().unwrap().0 == Some(0)).then_some(())).unwrap();
    for round in 0..20 {
        world.write(&format!("{complaints}# again {round}\n")).unwrap();
        assert!(world.place.reload().is_err());
    }
    let asked = Instant::now();
    term(&agent);
    assert_eq!(agent.wait().unwrap().code(), Some(0));
    assert!(asked.elapsed() < Duration::from_secs(5), "{:?}", asked.elapsed());
}

#[test]
fn names_of_policy_files_are_harmless_in_log_status_and_check() {
    let world = World::opening(&[ONE]).unwrap();
    let mut agent = world.start(&[]).unwrap();
    let file = world.policies.path().join(format!("{HOSTILE}.yaml"));
    fs::write(&file, "nonsense: \"\u{1b}]0;x\u{7}\u{202e}\"\n").unwrap();
    let line = agent.wait_for("the last good policy stays in force").unwrap();
    assert!(is_harmless(&line), "{line:?}");
    let complaint = agent.log().iter().find(|line| line.contains("a\\u{1b}[31m\\u{a}")).cloned();
    assert!(complaint.is_some_and(|line| is_harmless(&line)), "{:#?}", agent.log());
    assert!(agent.log().iter().all(|line| is_harmless(line)), "{:#?}", agent.log());

    let (_, status) = world.place.status().unwrap();
    assert!(strings(&status).iter().all(|text| is_harmless(text) && !text.contains('\n')), "{status:#}");
    for args in [vec!["status", "--output", "text"], vec!["check"], vec!["check", "--output", "json"]] {
        let mut args = args;
        if args[0] == "check" {
            args.push(world.policies.path().to_str().unwrap());
        }
        let output = world.place.output(&args).unwrap();
        for stream in [&output.stdout, &output.stderr] {
            assert!(is_harmless(std::str::from_utf8(stream).unwrap()), "{args:?}: {output:?}");
        }
        if let Ok(told) = serde_json::from_slice::<Value>(&output.stdout) {
            assert!(strings(&told).iter().all(|text| is_harmless(text)), "{told:#}");
        }
    }
    let path = world.policies.path().to_str().unwrap();
    let output = world.place.output(&["explain", path, "--to", "192.0.2.2:80"]).unwrap();
    assert!(is_harmless(std::str::from_utf8(&output.stderr).unwrap()), "{output:?}");
}

#[test]
fn names_of_cgroups_and_programs_are_harmless_in_reports() {
    for (format, forged) in [("text", " uid=0 cgroup=/x"), ("json", "\",\"uid\":0,\"x\":\"")] {
        let world = World::opening(&[ONE]).unwrap();
        let cgroup = world.cgroup.child(format!("{}{forged}", HOSTILE.replace('\n', "\t")).replace('/', "-")).unwrap();
        let mut command = Command::new(binary().unwrap());
        command.arg("run").arg("--policies").arg(world.policies.path()).arg("--cgroup").arg(world.cgroup.path());
        command.args(["--output", format]);
        world.place.tell(&mut command);
        let mut agent = piped(command).unwrap();
        let mut log = BufReader::new(agent.stderr.take().unwrap()).lines().map(Result::unwrap);
        assert!(log.any(|line| line.contains("policy applied generation=1 ")));
        let directory = tempfile::tempdir().unwrap();
        let odd = directory.path().join(HOSTILE);
        fs::copy(program("dial").unwrap(), &odd).unwrap();
        let mut dialer = Dialer::start(&odd, &cgroup, &world.namespace).unwrap();
        let call = Call { method: Method::UdpConnect, mapped: false, to: "192.0.2.2:80".parse().unwrap() };
        assert!(dialer.is_refused(&call).unwrap());
        let mut line = String::new();
        BufReader::new(agent.stdout.take().unwrap()).read_line(&mut line).unwrap();
        assert!(is_harmless(&line) && line.lines().count() == 1, "{line:?}");
        if format == "json" {
            let denial: Value = serde_json::from_str(&line).unwrap();
            assert!(strings(&denial).iter().all(|text| is_harmless(text) && !text.contains('\n')), "{denial:#}");
            assert!(denial["cgroup"]["path"].as_str().unwrap().ends_with("\",\"uid\":0,\"x\":\""), "{denial:#}");
        } else {
            assert!(line.contains(" cgroup=\"") && line.trim_end().ends_with('"'), "{line}");
        }
        term(&agent);
        agent.wait().unwrap();
    }
}

#[test]
fn what_a_command_of_exec_calls_itself_is_harmless() {
    let world = World::opening(&[ONE]).unwrap();
    let directory = tempfile::tempdir().unwrap();
    let odd = directory.path().join(HOSTILE);
    fs::copy("/bin/bash", &odd).unwrap();
    for format in ["text", "json"] {
        let mut command = Command::new(binary().unwrap());
        world.place.tell(&mut command);
        command.args(["exec", "--output", format, "--default", "Deny", "--"]).arg(&odd);
        command.args(["-c", "true >/dev/tcp/192.0.2.2/80"]).stdin(Stdio::null()).stdout(Stdio::null());
        let mut command = world.namespace.run(move || command.stderr(Stdio::piped()).spawn()).unwrap().unwrap();
        let mut said = String::new();
        command.stderr.take().unwrap().read_to_string(&mut said).unwrap();
        command.wait().unwrap();
        // The shell itself says something, in which its name stands as it is.
        let ours: Vec<&str> =
            said.lines().filter(|line| line.contains("192.0.2.2") && !line.contains("/dev/tcp/")).collect();
        assert!(!ours.is_empty() && ours.iter().all(|line| is_harmless(line)), "{said:?}");
    }
}

/// Whose reports were lost, and where, is told while a workload floods.
#[test]
fn status_and_log_tell_whose_reports_were_lost() {
    let mut world = World::opening(&[ONE]).unwrap();
    let quiet = world.cgroup.child("quiet").unwrap();
    let mut neighbour = Neighbour::start(&quiet, &world.namespace).unwrap();
    let noisy = world.cgroup.child("noisy").unwrap();
    noisy.take_process(world.dialer.pid()).unwrap();
    let command = run_command(world.policies.path(), world.cgroup.path(), &[]).unwrap();
    let (mut agent, reports) = Agent::watched(&world.place, command, &[neighbour.cgroup()]).unwrap();
    agent.wait_for("policy applied generation=1 ").unwrap();
    agent.signal(Signal::STOP).unwrap();
    refuse(&mut world, 60_000);
    neighbour.refuse(400).unwrap();
    agent.signal(Signal::CONT).unwrap();
    let line = agent.wait_for("denials were not reported").unwrap();
    assert!(line.contains("WARN"), "{line}");
    let status = wait_until_told(&world, 60_400);
    let lost = status["reports"]["lost"].as_array().unwrap();
    assert!(lost.iter().all(|loss| loss["cgroup"] != neighbour.cgroup()), "{status:#}");
    assert!(lost.iter().any(|loss| loss["cgroup"] == noisy.name()), "{status:#}");
    assert_eq!(reports.of(neighbour.cgroup()), 400);
    world.cgroup.take_process(world.dialer.pid()).unwrap();
}
