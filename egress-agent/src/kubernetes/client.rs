//! The connection to the API, and what went wrong with it, for people.

use std::time::Duration;

use kube::{Client, Config, Error};
use tokio::time::timeout;

use super::ClusterError;
use crate::{policy::diagnostic, run::causes};

/// A client, and where it is connected to.
pub(super) struct Connected {
    pub(super) client: Client,
    pub(super) server: String,
}

/// By the service account of the pod, or the file that `KUBECONFIG` names. Nothing is sent yet.
pub(super) async fn connect() -> Result<Connected, ClusterError> {
    let mut config = Config::infer().await.map_err(|error| ClusterError::Unknown(error.into()))?;
    config.connect_timeout = Some(Duration::from_secs(10));
    let server = config.cluster_url.to_string();
    let client = Client::try_from(config).map_err(|error| ClusterError::Unknown(error.into()))?;
    Ok(Connected { client, server })
}

/// An error in one line. What a server says is of any length and content.
pub(super) fn explain(error: &Error) -> String {
    let text = match error {
        Error::Api(status) => {
            let help = match status.code {
                401 => ": the token is not accepted, or has expired",
                403 => ": the role of the service account lacks this",
                404 => ": the API does not serve this",
                _ => "",
            };
            format!("{} {}{help}", status.code, status.message)
        }
        error => told(error),
    };
    shortened(&text)
}

/// An error with its causes, which many errors tell of by themselves.
fn told(error: &Error) -> String {
    let mut text = String::new();
    for cause in causes(error).map(ToString::to_string) {
        if text.is_empty() {
            text = cause;
        } else if !text.contains(&cause) {
            text = format!("{text}: {cause}");
        }
    }
    text
}

/// The beginning of what a server says, harmless to a terminal.
pub(super) fn shortened(text: &str) -> String {
    diagnostic::shortened(text.trim(), 300)
}

/// What a server says that says nothing.
pub(super) const SILENCE: &str = "the server does not answer";

/// An answer, or why there is none within some time.
pub(super) async fn answered<T>(
    patience: Duration,
    request: impl Future<Output = Result<T, Error>>,
) -> Result<T, String> {
    match timeout(patience, request).await {
        Ok(answer) => answer.map_err(|error| explain(&error)),
        Err(_) => Err(SILENCE.to_owned()),
    }
}
