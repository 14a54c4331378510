//! Under systemd.
#[test]
#[ignore = "needs systemd as the first process: cargo xtask vm --test systemd"]
fn boots() {
    let out = std::process::Command::new("sh").args(["-c", "systemctl --no-pager list-units; systemctl list-jobs; mount; systemd-analyze blame | head -20; free; mkdir -p /run/systemd/system; systemd-run --scope --slice user-4700.slice cat /proc/self/cgroup; systemd-run --unit=foo --service-type=oneshot -p StandardOutput=file:/dev/console cat /proc/self/cgroup"]).output().unwrap();
    println!("{}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
}
