//! `egress-agent`: the command. Only here are errors printed, the environment read, and the exit status chosen.

use std::process::ExitCode;

use clap::Parser;
use egress_agent::{
    cli::{Cli, Command, LogLevel, RunArgs},
    run::{self, chain},
};
use tracing_subscriber::filter::LevelFilter;

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
    let color = std::io::IsTerminal::is_terminal(&std::io::stderr()) && std::env::var_os("NO_COLOR").is_none();
    let subscriber = tracing_subscriber::fmt()
        .with_max_level(filter)
        .with_writer(std::io::stderr)
        .with_ansi(color)
        .with_target(false);
    subscriber.init();
}
