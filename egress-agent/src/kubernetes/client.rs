//! The connection to the API, and what went wrong with it, for people.

use std::time::Duration;

use kube::{Client, Config, Error};

use super::ClusterError;
use crate::{policy::diagnostic::printable, run::chain};

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
        error => chain(error),
    };
    shortened(&text)
}

/// The beginning of a text, harmless to a terminal.
pub(super) fn shortened(text: &str) -> String {
    const LONGEST: usize = 300;
    let shown: String = text.chars().take(LONGEST).collect();
    let more = if shown.len() < text.len() { "…" } else { "" };
    format!("{}{more}", printable(shown.trim()))
}
