//! `egress-agent`: the command. Only here are errors printed, the environment read, and the exit status chosen.

use std::{io::IsTerminal, process::ExitCode};

use clap::Parser;
use egress_agent::{
    cli::{Cli, Command, LogLevel, RunArgs},
    run::{self, chain},
};
use tracing_subscriber::{
    filter::{LevelFilter, Targets},
    layer::SubscriberExt,
    util::SubscriberInitExt,
};

/// The kernel programs.
static OBJECT: &[u8] = aya::include_bytes_aligned!(env!("EGRESS_EBPF_OBJECT"));

fn main() -> ExitCode {
    let cli = Cli::parse();
    start_log(cli.log);
    match cli.command {
        Command::Run(args) => run(&args, cli.log),
    }
}

fn run(args: &RunArgs, log: LogLevel) -> ExitCode {
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            tracing::error!(%error, "cannot start");
            return ExitCode::from(4);
        }
    };
    match runtime.block_on(run::run(args, log, OBJECT)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{}", chain(&error));
            ExitCode::from(error.exit_code())
        }
    }
}

fn start_log(level: LogLevel) {
    let filter = match level {
        LogLevel::Error => LevelFilter::ERROR,
        LogLevel::Warn => LevelFilter::WARN,
        LogLevel::Info => LevelFilter::INFO,
        LogLevel::Debug => LevelFilter::DEBUG,
    };
    // Libraries speak only of what goes wrong, in their own words.
    let targets = Targets::new()
        .with_default(filter.min(LevelFilter::WARN))
        .with_targets([("egress_agent", filter), ("egress_ebpf", filter)]);
    let color = std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none();
    let format = tracing_subscriber::fmt::layer().with_writer(std::io::stderr).with_ansi(color).with_target(false);
    tracing_subscriber::registry().with(format).with(targets).init();
}
