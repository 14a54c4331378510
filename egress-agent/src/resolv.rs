//! The resolvers of the system: what `dns: { servers: System }` means.

use std::{fs, io, net::IpAddr, path::Path};

/// Where `resolv.conf(5)` is.
pub const RESOLV_CONF: &str = "/etc/resolv.conf";

/// The name servers a file names. The resolver asks this host if it names none, or is not there (`resolv.conf(5)`).
pub fn resolvers(path: &Path) -> io::Result<Vec<IpAddr>> {
    match fs::read(path) {
        Ok(bytes) => Ok(parse(&String::from_utf8_lossy(&bytes))),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(parse("")),
        Err(error) => Err(error),
    }
}

fn parse(text: &str) -> Vec<IpAddr> {
    let server = |line: &str| {
        let address = line.trim_start().strip_prefix("nameserver")?;
        let address = address.strip_prefix([' ', '\t'])?.split_ascii_whitespace().next()?;
        address.split('%').next()?.parse().ok()
    };
    let servers: Vec<IpAddr> = text.lines().filter_map(server).collect();
    if servers.is_empty() { vec![IpAddr::from([127, 0, 0, 1])] } else { servers }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_nameserver_lines_count() {
        let text = "# nameserver 10.0.0.1\nsearch example.com\nnameserver 10.0.0.2 # x\n nameserver\tfe80::1%eth0\n\
                    nameserver10.0.0.3\nnameserver bad\n";
        let expected: Vec<IpAddr> = ["10.0.0.2", "fe80::1"].iter().map(|text| text.parse().unwrap()).collect();
        assert_eq!(parse(text), expected);
    }

    #[test]
    fn without_a_server_this_host_is_asked() {
        assert_eq!(parse("search example.com\n"), [IpAddr::from([127, 0, 0, 1])]);
    }
}
