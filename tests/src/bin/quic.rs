//! A QUIC server that sends back what it is sent, and a client that asks it to.
//!
//! QUIC libraries send as few others do: by `sendmsg` with the source in ancillary data, many datagrams in one call.

use std::{fs, net::SocketAddr, path::PathBuf, sync::Arc};

use anyhow::{Context as _, Result, ensure};
use clap::Parser;
use quinn::{
    ClientConfig, Connection, Endpoint, ServerConfig,
    rustls::{
        RootCertStore,
        pki_types::{CertificateDer, PrivatePkcs8KeyDer},
    },
};

/// What is sent, and sent back, in bytes: many datagrams each way.
const LENGTH: usize = 1 << 20;

#[derive(Parser)]
enum Command {
    /// Serve clients one after another, until killed; say `ready` when the first may come
    Serve {
        address: SocketAddr,
        /// Where to write the certificate
        certificate: PathBuf,
    },
    /// Have a server send back a megabyte
    Ask {
        server: SocketAddr,
        /// The server's certificate
        certificate: PathBuf,
    },
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<()> {
    match Command::parse() {
        Command::Serve { address, certificate } => serve(address, certificate).await,
        Command::Ask { server, certificate } => ask(server, certificate).await,
    }
}

const NAME: &str = "server.test";

async fn serve(address: SocketAddr, certificate: PathBuf) -> Result<()> {
    let made = rcgen::generate_simple_self_signed([NAME.to_owned()])?;
    let key = PrivatePkcs8KeyDer::from(made.signing_key.serialize_der());
    let config = ServerConfig::with_single_cert(vec![made.cert.der().clone()], key.into())?;
    let endpoint = Endpoint::server(config, address)?;
    fs::write(certificate, made.cert.der())?;
    println!("ready");
    while let Some(incoming) = endpoint.accept().await {
        if let Err(error) = echo(&incoming.await?).await {
            eprintln!("{error:#}");
        }
    }
    Ok(())
}

async fn echo(connection: &Connection) -> Result<()> {
    let (mut answer, mut question) = connection.accept_bi().await?;
    answer.write_all(&question.read_to_end(LENGTH).await?).await?;
    answer.finish()?;
    connection.closed().await;
    Ok(())
}

async fn ask(server: SocketAddr, certificate: PathBuf) -> Result<()> {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from(fs::read(certificate)?))?;
    let any = SocketAddr::new(if server.is_ipv4() { [0; 4].into() } else { [0_u16; 8].into() }, 0);
    let mut endpoint = Endpoint::client(any)?;
    endpoint.set_default_client_config(ClientConfig::with_root_certificates(Arc::new(roots))?);
    let connection = endpoint.connect(server, NAME)?.await.context("no connection")?;
    let (mut question, mut answer) = connection.open_bi().await?;
    let sent: Vec<u8> = (0..LENGTH).map(|index| index.to_le_bytes()[0]).collect();
    question.write_all(&sent).await?;
    question.finish()?;
    ensure!(answer.read_to_end(LENGTH).await? == sent, "the answer differs");
    connection.close(0_u32.into(), b"");
    endpoint.wait_idle().await;
    Ok(())
}
