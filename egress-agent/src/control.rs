//! The agent's control socket: one JSON line in, one out. `status` and `reload` are its clients.
//!
//! It lies in the run directory, one for each pin directory, and answers root alone. A thread of its own answers, from what
//! the event loop posted last where that is busy: `status` waits for nothing.

use std::{
    fmt::Write as _,
    fs::{self, DirBuilder},
    io::{self, BufRead, BufReader, Write},
    os::unix::{
        ffi::OsStrExt,
        fs::{DirBuilderExt, PermissionsExt},
        net::{UnixListener as BlockingListener, UnixStream as BlockingStream},
    },
    path::{Path, PathBuf},
    sync::Arc,
    thread,
    time::Duration,
};

use serde::{Deserialize, Serialize, de::DeserializeOwned};
use sha2::{Digest, Sha256};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt},
    net::{UnixListener, UnixStream},
    sync::{Semaphore, mpsc, oneshot},
    time::{sleep, timeout},
};

use crate::board::Board;

/// What can be asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "lowercase")]
pub enum Request {
    /// What the agent knows and the kernel does not.
    Status,
    /// Read the policies again. Answered once that is done.
    Reload,
}

/// A request with the place for its answer: of [`Request::Reload`] one JSON value; of [`Request::Status`] nothing, once the
/// loop has posted anew.
#[derive(Debug)]
pub(crate) struct Asked {
    pub(crate) request: Request,
    pub(crate) answer: oneshot::Sender<String>,
}

/// Where the socket of the agent of a pin directory lies.
pub fn socket(run_directory: &Path, pins: &Path) -> PathBuf {
    const LONGEST: usize = 48;
    let name = pins.as_os_str().as_bytes();
    let is_plain = |byte: &u8| byte.is_ascii_alphanumeric() || matches!(byte, b'/' | b'_' | b'.');
    let name = if name.len() <= LONGEST && name.iter().all(is_plain) {
        String::from_utf8_lossy(name).trim_matches('/').replace('/', "-")
    } else {
        hexadecimal(&Sha256::digest(name)[..16])
    };
    run_directory.join(format!("{name}.sock"))
}

/// Two digits for each byte.
pub fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        // Writing to a string cannot fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// Answers until dropped. The socket is removed then.
#[derive(Debug)]
pub(crate) struct Control {
    path: PathBuf,
    requests: mpsc::Receiver<Asked>,
}

/// Longest request, in bytes.
const LONGEST: u64 = 4096;
/// How long a client may take to ask, or to take its answer.
const PATIENCE: Duration = Duration::from_secs(5);
/// Most clients at a time: others wait to be accepted, so that clients never take the descriptors of the agent.
const MAX_CLIENTS: usize = 64;
/// Most of them that wait for a reload, so that there is always one left who may ask for the status.
const MAX_WAITING: usize = 32;
/// How long a client waits for a reload at most.
const RELOAD_PATIENCE: Duration = Duration::from_mins(10);
/// How long the loop is given to post anew before what it posted last is the answer.
const FRESH: Duration = Duration::from_millis(30);
/// How long nothing is accepted after that failed.
const PAUSE: Duration = Duration::from_millis(100);

impl Control {
    /// Listens. Whoever holds the claim on the pin directory owns the socket, so one that is left there is removed.
    pub(crate) fn listen(path: PathBuf, board: Arc<Board>) -> io::Result<Self> {
        let directory = path.parent().unwrap_or(Path::new("/"));
        DirBuilder::new().recursive(true).mode(0o700).create(directory)?;
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let listener = BlockingListener::bind(&path)?;
        listener.set_nonblocking(true)?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600))?;
        let (sender, requests) = mpsc::channel(16);
        let desk = Arc::new(Desk { board, requests: sender, waiting: Semaphore::new(MAX_WAITING) });
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        thread::Builder::new().name("control".to_owned()).spawn(move || runtime.block_on(accept(listener, desk)))?;
        Ok(Self { path, requests })
    }

    /// The next request.
    pub(crate) async fn next(&mut self) -> Asked {
        match self.requests.recv().await {
            Some(asked) => asked,
            None => std::future::pending().await,
        }
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        // It may be gone already; the next agent removes it otherwise.
        let _ = fs::remove_file(&self.path);
    }
}

/// Whoever answers.
struct Desk {
    board: Arc<Board>,
    requests: mpsc::Sender<Asked>,
    waiting: Semaphore,
}

/// Accepts clients for ever. What fails there, such as having no descriptor left, passes.
async fn accept(listener: BlockingListener, desk: Arc<Desk>) {
    let listener = match UnixListener::from_std(listener) {
        Ok(listener) => listener,
        Err(error) => return tracing::error!(%error, "the control socket is not answered"),
    };
    let clients = Arc::new(Semaphore::new(MAX_CLIENTS));
    let mut is_failing = false;
    loop {
        // It is never closed.
        let Ok(client) = Arc::clone(&clients).acquire_owned().await else { return };
        match listener.accept().await {
            Ok((stream, _)) => {
                is_failing = false;
                let desk = Arc::clone(&desk);
                tokio::spawn(async move {
                    // Whatever fails there fails for the client alone.
                    let _ = desk.serve(stream).await;
                    drop(client);
                });
            }
            Err(error) => {
                if !std::mem::replace(&mut is_failing, true) {
                    tracing::warn!(%error, "cannot accept clients of the control socket; tried again");
                }
                sleep(PAUSE).await;
            }
        }
    }
}

impl Desk {
    async fn serve(&self, stream: UnixStream) -> io::Result<()> {
        let own = rustix::process::geteuid().as_raw();
        if ![0, own].contains(&stream.peer_cred()?.uid()) {
            return Ok(());
        }
        let (reader, mut writer) = stream.into_split();
        let mut line = String::new();
        let mut limited = tokio::io::BufReader::new(reader.take(LONGEST));
        timeout(PATIENCE, limited.read_line(&mut line)).await??;
        let mut text = match serde_json::from_str(&line)? {
            Request::Status => self.status().await,
            Request::Reload => timeout(RELOAD_PATIENCE, self.reload()).await??,
        };
        text.push('\n');
        timeout(PATIENCE, writer.write_all(text.as_bytes())).await?
    }

    /// The loop is asked to post anew, and not waited for.
    async fn status(&self) -> String {
        if !self.board.is_changing() {
            let (answer, answered) = oneshot::channel();
            let fresh = async {
                let asked = Asked { request: Request::Status, answer };
                if self.requests.send(asked).await.is_ok() {
                    // What was posted last is as good as what is not posted any more.
                    let _ = answered.await;
                }
            };
            // As good as that is what was posted before.
            let _ = timeout(FRESH, fresh).await;
        }
        serde_json::to_string(&self.board.told()).unwrap_or_default()
    }

    async fn reload(&self) -> io::Result<String> {
        let (answer, answered) = oneshot::channel();
        let unanswered = || io::Error::from(io::ErrorKind::ConnectionAborted);
        let sent = self.requests.send(Asked { request: Request::Reload, answer }).await;
        sent.map_err(|_| unanswered())?;
        // Those beyond the most are told when they ask again.
        let _turn = self.waiting.try_acquire().map_err(|_| unanswered())?;
        answered.await.map_err(|_| unanswered())
    }
}

/// Tells the agent of a pin directory, and does not wait.
pub fn tell(socket: &Path, request: Request) -> io::Result<()> {
    send(socket, request).map(drop)
}

fn send(socket: &Path, request: Request) -> io::Result<BlockingStream> {
    let mut stream = BlockingStream::connect(socket)?;
    let mut line = serde_json::to_string(&request)?;
    line.push('\n');
    stream.write_all(line.as_bytes())?;
    Ok(stream)
}

/// How long an answer is waited for that takes no time.
const ANSWERED: Duration = Duration::from_secs(2);

/// Asks the agent of a pin directory, and waits for its answer: of a reload for as long as it may take, else not for long.
pub fn ask<T: DeserializeOwned>(socket: &Path, request: Request) -> io::Result<T> {
    let patience = match request {
        Request::Status => ANSWERED,
        Request::Reload => RELOAD_PATIENCE,
    };
    ask_within(socket, request, patience)
}

/// Asks the agent of a pin directory; an error if the answer takes longer.
pub fn ask_within<T: DeserializeOwned>(socket: &Path, request: Request, patience: Duration) -> io::Result<T> {
    let stream = send(socket, request)?;
    stream.set_read_timeout(Some(patience))?;
    let mut answer = String::new();
    BufReader::new(stream).read_line(&mut answer).map_err(|error| match error.kind() {
        io::ErrorKind::WouldBlock => io::ErrorKind::TimedOut.into(),
        _ => error,
    })?;
    Ok(serde_json::from_str(&answer)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_pin_directory_has_a_socket_of_its_own() {
        let at = |pins: &str| socket(Path::new("/run/egress"), Path::new(pins));
        assert_eq!(at("/sys/fs/bpf/egress"), Path::new("/run/egress/sys-fs-bpf-egress.sock"));
        let long = "/sys/fs/bpf/".to_owned() + &"x".repeat(200);
        assert!(at(&long).as_os_str().len() < 100);
        assert_ne!(at(&long), at(&(long.clone() + "y")));
        assert_ne!(at("/a-b"), at("/a/b"));
    }
}
