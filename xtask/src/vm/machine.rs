//! A machine in QEMU: it is booted, and runs until it powers off by itself or takes too long.
//!
//! It has a console and no network card: what is tested in it cannot send anything anywhere.

use std::{
    fs::File,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};

use super::image;

/// What to boot.
pub struct Machine<'a> {
    /// Where QEMU is unpacked.
    pub qemu: &'a Path,
    /// Where the packages of the kernel are unpacked.
    pub kernel: &'a Path,
    pub initramfs: &'a Path,
    /// Where the console is written.
    pub log: &'a Path,
    /// How long it may take for all of it.
    pub patience: Duration,
}

/// Without hardware virtualisation a kernel boots in some seconds all the same.
const HARDWARE: [&str; 15] = [
    "-nodefaults",
    "-no-user-config",
    "-no-reboot",
    "-display",
    "none",
    "-serial",
    "stdio",
    "-accel",
    "tcg,thread=multi",
    "-cpu",
    "max",
    "-smp",
    "2",
    "-m",
    "2048",
];

/// The last word is for systemd: the console is for the tests.
const KERNEL_LINE: &str = "console=ttyS0 quiet loglevel=3 panic=-1 systemd.show_status=no";

impl Machine<'_> {
    /// Boots it and waits until it has powered off.
    pub fn run(&self) -> Result<()> {
        let mut command = self.command()?;
        let console = File::create(self.log).with_context(|| format!("cannot create {}", self.log.display()))?;
        let mut machine = command.stdin(Stdio::null()).stdout(console).spawn().context("cannot start QEMU")?;
        match wait(&mut machine, self.patience) {
            Ok(Some(status)) => {
                ensure!(status.success(), "QEMU ended with {status}");
                Ok(())
            }
            Ok(None) => {
                end(&mut machine)?;
                let minutes = self.patience.as_secs() / 60;
                bail!("the machine did not come to an end within {minutes} minutes: see {}", self.log.display())
            }
            Err(error) => end(&mut machine).and(Err(error)),
        }
    }

    fn command(&self) -> Result<Command> {
        let mut command = Command::new(self.qemu.join("usr/bin/qemu-system-x86_64"));
        command.env("LD_LIBRARY_PATH", std::env::join_paths(crate::debian::library_directories(self.qemu)?)?);
        for data in ["usr/share/qemu", "usr/share/seabios"] {
            command.arg("-L").arg(self.qemu.join(data));
        }
        command.args(HARDWARE).arg("-kernel").arg(self.vmlinuz()?).arg("-initrd").arg(self.initramfs);
        command.args(["-append", KERNEL_LINE]);
        Ok(command)
    }

    fn vmlinuz(&self) -> Result<PathBuf> {
        image::find(self.kernel, |name| name == "vmlinuz" || name.starts_with("vmlinuz-"))
            .context("the packages have no kernel")
    }
}

/// How it ended, if it did in time.
fn wait(machine: &mut Child, patience: Duration) -> Result<Option<ExitStatus>> {
    let end = Instant::now() + patience;
    while Instant::now() < end {
        if let Some(status) = machine.try_wait().context("cannot wait for QEMU")? {
            return Ok(Some(status));
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    Ok(None)
}

fn end(machine: &mut Child) -> Result<()> {
    machine.kill().and_then(|()| machine.wait()).map(drop).context("cannot end QEMU")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_that_takes_too_long_is_ended() {
        let mut hanging = Command::new("sleep").arg("1000").spawn().unwrap();
        assert!(wait(&mut hanging, Duration::from_millis(300)).unwrap().is_none());
        end(&mut hanging).unwrap();
        let mut ending = Command::new("true").spawn().unwrap();
        assert!(wait(&mut ending, Duration::from_mins(1)).unwrap().unwrap().success());
    }
}
