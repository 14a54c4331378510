//! What `cargo xtask run` shows: the ratings scenario, step by step, as a person would want to read it.

use std::{
    fs,
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use anyhow::{Context, Result, bail};
use egress_tests::{
    mariadb::Answer,
    scenario::{SERVER, Scenario, mysql_external},
};
use serde_json::Value;
use signal_hook::consts::{SIGINT, SIGTERM};

fn main() -> ExitCode {
    let interrupted = Arc::new(AtomicBool::new(false));
    let result = listen(&interrupted).and_then(|()| show(&interrupted));
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) if interrupted.load(Ordering::Relaxed) => {
            println!("\ninterrupted; everything is removed");
            ExitCode::from(130)
        }
        Err(error) => {
            eprintln!("\nerror: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// From here on an interrupt ends the current step with an error, and what was set up is removed on the way out.
fn listen(interrupted: &Arc<AtomicBool>) -> Result<()> {
    for signal in [SIGINT, SIGTERM] {
        signal_hook::flag::register(signal, Arc::clone(interrupted)).context("cannot listen for signals")?;
    }
    Ok(())
}

fn show(interrupted: &AtomicBool) -> Result<()> {
    let step = |title: &str| {
        if interrupted.load(Ordering::Relaxed) {
            bail!("interrupted");
        }
        println!("\n{title}");
        Ok(())
    };
    step(&format!("A ratings service wants to read from MySQL at {SERVER}:3306, outside the cluster."))?;
    println!("  Setting up a MariaDB server and a client, each in a network namespace, and the agent.");
    let mut scenario = Scenario::start()?;
    println!("  egress-agent filters cgroup {}; its policy directory is empty.", scenario.cgroup.name());

    step("1. No policy names the server: the connection is refused, and the refusal says who and where to.")?;
    refused(&mut scenario)?;

    step("2. Drop this ServiceEntry into the policy directory:")?;
    for line in fs::read_to_string(mysql_external())?.lines().filter(|line| !line.starts_with('#')) {
        println!("  | {line}");
    }
    scenario.add_policy(2)?;
    println!("  in force, without a restart");

    step("3. The next connection works.")?;
    println!("  $ mariadb --host {SERVER} --execute 'SELECT rating FROM test.ratings'");
    match scenario.ask()? {
        Answer::Ratings(ratings) => println!("  {}", ratings.replace('\n', "\n  ")),
        Answer::Error(said) => bail!("the policy is in force, but the client failed: {said}"),
    }

    step("4. Remove the file: refused again.")?;
    scenario.remove_policy(3)?;
    refused(&mut scenario)?;

    step("Done. Stopping the agent and removing the namespaces and the cgroup.")?;
    let (status, _, log) = scenario.agent.stop()?;
    if !status.success() {
        bail!("the agent ended with {status}:\n{}", log.join("\n"));
    }
    Ok(())
}

fn refused(scenario: &mut Scenario) -> Result<()> {
    println!("  $ mariadb --host {SERVER} --execute 'SELECT rating FROM test.ratings'");
    let (said, denial) = scenario.ask_in_vain()?;
    println!("  {said}");
    println!("  {}", summary(&denial));
    Ok(())
}

fn summary(denial: &Value) -> String {
    let text = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    format!(
        "egress-agent: {} {} {}:{} reason={} comm={} pid={} uid={} cgroup={}",
        text(&denial["verdict"]),
        text(&denial["protocol"]),
        text(&denial["destination"]["address"]),
        denial["destination"]["port"],
        text(&denial["reason"]),
        text(&denial["process"]["comm"]),
        denial["process"]["pid"],
        denial["process"]["uid"],
        text(&denial["cgroup"]["path"]),
    )
}
