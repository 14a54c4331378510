//! The agent's control socket: one JSON line in, one out. `status` and `reload` are its clients.
//!
//! It lies in the run directory, one for each pin directory, and answers root alone.

use std::{
    fmt::Write as _,
    fs::{self, DirBuilder},
    io::{self, BufRead, BufReader, Write},
    os::unix::{
        ffi::OsStrExt,
        fs::{DirBuilderExt, PermissionsExt},
        net::UnixStream as BlockingStream,
    },
    path::{Path, PathBuf},
    time::Duration,
};

use serde::{Deserialize, Serialize, de::DeserializeOwned};
use sha2::{Digest, Sha256};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt},
    net::{UnixListener, UnixStream},
    sync::{mpsc, oneshot},
};

/// What can be asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "lowercase")]
pub enum Request {
    /// What the agent knows and the kernel does not.
    Status,
    /// Read the policies again. Answered once that is done.
    Reload,
}

impl Request {
    /// How long its answer is waited for. A large policy takes its time; whoever asks how things are has none.
    const fn patience(self) -> Duration {
        match self {
            Self::Status => Duration::from_secs(2),
            Self::Reload => Duration::from_mins(10),
        }
    }
}

/// A request with the place for its answer, which is one JSON value.
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
/// How long a client may take to ask.
const PATIENCE: Duration = Duration::from_secs(5);

impl Control {
    /// Listens. Whoever holds the claim on the pin directory owns the socket, so one that is left there is removed. Must
    /// be called in a tokio runtime.
    pub(crate) fn listen(path: PathBuf) -> io::Result<Self> {
        let directory = path.parent().unwrap_or(Path::new("/"));
        DirBuilder::new().recursive(true).mode(0o700).create(directory)?;
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let listener = UnixListener::bind(&path)?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600))?;
        let (sender, requests) = mpsc::channel(16);
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(tokio::time::timeout(Duration::from_mins(10), serve(stream, sender.clone())));
            }
        });
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

/// One client. Whatever fails here fails for the client alone.
async fn serve(stream: UnixStream, requests: mpsc::Sender<Asked>) -> io::Result<()> {
    let own = rustix::process::geteuid().as_raw();
    if ![0, own].contains(&stream.peer_cred()?.uid()) {
        return Ok(());
    }
    let (reader, mut writer) = stream.into_split();
    let mut line = String::new();
    let mut reader = tokio::io::BufReader::new(reader.take(LONGEST));
    tokio::time::timeout(PATIENCE, reader.read_line(&mut line)).await.map_err(io::Error::from)??;
    let (answer, answered) = oneshot::channel();
    let request = serde_json::from_str(&line)?;
    if requests.send(Asked { request, answer }).await.is_ok()
        && let Ok(mut text) = answered.await
    {
        text.push('\n');
        writer.write_all(text.as_bytes()).await?;
    }
    Ok(())
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

/// Asks the agent of a pin directory, and waits for its answer.
pub fn ask<T: DeserializeOwned>(socket: &Path, request: Request) -> io::Result<T> {
    let stream = send(socket, request)?;
    stream.set_read_timeout(Some(request.patience()))?;
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
