//! Where file systems are mounted.

use std::{ffi::OsString, fs, io, os::unix::ffi::OsStringExt as _, path::PathBuf};

/// The mount points of a type of file system that this process sees, in the order of its mounts.
pub(crate) fn of_type(kind: &str) -> io::Result<Vec<PathBuf>> {
    Ok(parse(&fs::read("/proc/self/mountinfo")?, kind))
}

/// Fields of a line, by `proc_pid_mountinfo(5)`: 5 is the mount point; the type of the file system follows a lone `-`.
pub(crate) fn parse(mounts: &[u8], wanted: &str) -> Vec<PathBuf> {
    let of_line = |line: &[u8]| {
        let mut fields = line.split(|&byte| byte == b' ');
        let point = fields.nth(4)?;
        let kind = fields.skip_while(|&field| field != b"-").nth(1)?;
        (kind == wanted.as_bytes()).then(|| unescape(point))
    };
    mounts.split(|&byte| byte == b'\n').filter_map(of_line).collect()
}

/// Blanks and backslashes stand as three octal digits in mountinfo.
fn unescape(field: &[u8]) -> PathBuf {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&first, after)) = rest.split_first() {
        let digits = after.get(..3).and_then(|digits| std::str::from_utf8(digits).ok());
        match digits.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(byte) if first == b'\\' => {
                bytes.push(byte);
                rest = &after[3..];
            }
            _ => {
                bytes.push(first);
                rest = after;
            }
        }
    }
    OsString::from_vec(bytes).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blanks_in_a_mount_point_are_unescaped() {
        assert_eq!(parse(b"1 2 0:3 / /a\\040b rw - cgroup2 x rw", "cgroup2"), [PathBuf::from("/a b")]);
        assert_eq!(unescape(b"\\9"), PathBuf::from("\\9"));
    }

    #[test]
    fn the_type_follows_optional_fields() {
        let mounts = b"7 1 0:7 / /sys/kernel/security rw shared:9 - securityfs securityfs rw\n9 1 0:8 / /x rw - sysfs securityfs rw\n\n8";
        assert_eq!(parse(mounts, "securityfs"), [PathBuf::from("/sys/kernel/security")]);
    }
}
