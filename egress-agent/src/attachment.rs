//! The filtered cgroup over time.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use crate::{
    cgroup::Cgroup,
    dataplane::{Dataplane, DataplaneError},
    policy::load::watched,
    run::{RunError, chain, system},
    watch::Watch,
};

/// The cgroup that is filtered. It may be removed and made again, as systemd does when it restarts a unit; the programs go
/// with it, so they are attached again.
pub(crate) struct Attachment {
    given: PathBuf,
    mount: PathBuf,
    /// As it was when it was attached last.
    pub(crate) cgroup: Cgroup,
    is_attached: bool,
    /// Where its going and coming is noticed.
    pub(crate) watch: Watch,
}

/// How often the cgroup is looked after, beside the notice of changes.
pub(crate) const LOOK_AFTER: Duration = Duration::from_secs(1);

impl Attachment {
    /// Opens the cgroup; nothing is attached yet.
    pub(crate) fn new(given: &Path, mount: &Path) -> Result<Self, RunError> {
        let cgroup = Cgroup::open(given, mount)?;
        let mut watch = Watch::new().map_err(system("cannot watch the cgroup"))?;
        let directory = mount.join(cgroup.path.strip_prefix("/").unwrap_or(&cgroup.path));
        watch.set(watched(&[directory])).map_err(system("cannot watch the cgroup"))?;
        Ok(Self { given: given.to_owned(), mount: mount.to_owned(), cgroup, is_attached: false, watch })
    }

    /// Attaches the programs.
    pub(crate) fn attach(&mut self, dataplane: &mut Dataplane) -> Result<(), DataplaneError> {
        dataplane.attach(&self.cgroup.directory, &self.cgroup.path)?;
        self.is_attached = true;
        Ok(())
    }

    /// Attaches again where the cgroup was made anew.
    pub(crate) fn look_after(&mut self, dataplane: &mut Dataplane) {
        let cgroup = self.cgroup.path.display();
        match Cgroup::open(&self.given, &self.mount) {
            Ok(found) if self.is_attached && found.id == self.cgroup.id => {}
            Ok(found) => {
                let path = found.path.display().to_string();
                self.cgroup = found;
                match self.attach(dataplane) {
                    Ok(()) => tracing::warn!(cgroup = path, "the cgroup was made anew: attached again"),
                    Err(error) => tracing::error!(error = %chain(&error), "cannot attach again: nothing is filtered"),
                }
            }
            Err(error) if self.is_attached => {
                tracing::error!(%error, %cgroup, "the cgroup is gone: nothing is filtered until it is back");
                self.is_attached = false;
            }
            Err(_) => {}
        }
    }
}
