//! A large cluster that changes all the time: `cargo xtask kube --scale`, as root.
//!
//! 5,000 `ServiceEntry` objects in 20 enforced namespaces, 250 pods on this node, a real API server, and a real agent. How long it
//! takes to start, what it takes of memory, and then, at rest and while 100 objects change each second: its processor time,
//! and how long it takes from the server's answer to a change until a process in a pod feels it.

use std::{
    fs,
    net::SocketAddr,
    sync::atomic::{AtomicBool, AtomicU32, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use egress_tests::{
    PATIENCE,
    actor::Actor,
    agent::{Agent, Place, binary},
    cgroup::Cgroup,
    kube::{ADMIN, AGENT, ApiServer},
};
use kube::{
    Api, Client, Config,
    api::{ApiResource, DeleteParams, DynamicObject, GroupVersionKind, Patch, PatchParams, PostParams},
    config::{KubeConfigOptions, Kubeconfig},
};
use rustix::io::Errno;
use serde_json::{Value, json};
use tokio::{runtime, task::JoinSet, time::interval};

const ENTRIES: usize = 5_000;
const PODS: usize = 250;
const NAMESPACES: usize = 20;
/// Changes each second.
const CHURN: u32 = 100;
const PROBES: usize = 50;
const CONTAINER: &str = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";

fn main() -> Result<()> {
    let api = ApiServer::start()?;
    api.define()?;
    api.install()?;
    let top = Cgroup::new()?;
    let pods = top.child("kubepods")?;
    let begun = Instant::now();
    let uids = inside(&api, async |client| fill(&client).await)?;
    for uid in &uids {
        // They go with the one of all pods.
        std::mem::forget(pods.descendant(&format!("burstable/pod{uid}/{CONTAINER}"))?);
    }
    println!("{ENTRIES} entries and {PODS} pods made in {:.1} s", begun.elapsed().as_secs_f64());

    let place = Place::new()?;
    let mut command = api.network.command(binary()?, None)?;
    command.args(["run", "--kubernetes", "--node-name", "node", "--output", "json", "--default", "Allow", "--cgroup"]);
    command.arg(pods.path()).env("KUBECONFIG", api.kubeconfig(AGENT));
    let begun = Instant::now();
    let mut agent = Agent::spawn_in(Some(&place), command)?;
    agent.wait_for("policy applied generation=1 ")?;
    println!("started, and all of it in force, in {:.2} s", begun.elapsed().as_secs_f64());
    memory(&agent, &place)?;

    let first = uids.first().context("there are pods")?;
    let cgroup = std::mem::ManuallyDrop::new(pods.descendant(&format!("burstable/pod{first}/{CONTAINER}"))?);
    let mut actor = Actor::start(&api.network, &cgroup, None)?;
    let mut measure = |name: &str, changes: &AtomicU32, number: u8| -> Result<()> {
        let (begun, used) = (Instant::now(), processor_time(&agent)?);
        let before = changes.load(Ordering::Relaxed);
        let latencies = inside(&api, async |client| probe(&client, &mut actor, number).await)?;
        let seconds = begun.elapsed().as_secs_f64();
        let share = 100.0 * (processor_time(&agent)? - used) / seconds;
        let rate = f64::from(changes.load(Ordering::Relaxed) - before) / seconds;
        println!(
            "{name}: {rate:.0} other changes/s, {share:.1} % of a processor; until a change is felt: {}",
            summary(latencies)
        );
        Ok(())
    };
    let changes = AtomicU32::new(0);
    measure("at rest", &changes, 18)?;
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        let churning = scope.spawn(|| inside(&api, async |client| churn(&client, &stop, &changes).await));
        let measured = measure("changing", &changes, 19);
        stop.store(true, Ordering::Relaxed);
        churning.join().expect("the churn does not panic")?;
        measured
    })?;
    memory(&agent, &place)?;
    let (code, status) = place.status()?;
    ensure!(code == Some(0), "the agent is degraded: {}", status["degraded"]);
    println!("generation {}", status["policy"]["generation"]);
    Ok(())
}

/// Does something as the administrator, on a thread in the network of the server.
fn inside<T: Send>(api: &ApiServer, work: impl AsyncFnOnce(Client) -> Result<T> + Send) -> Result<T> {
    let file = api.kubeconfig(ADMIN);
    api.network.run(|| {
        runtime::Builder::new_current_thread().enable_all().build()?.block_on(async {
            let config =
                Config::from_custom_kubeconfig(Kubeconfig::read_from(file)?, &KubeConfigOptions::default()).await?;
            work(Client::try_from(config)?).await
        })
    })?
}

fn objects(
    client: &Client,
    namespace: &str,
    group: &str,
    version: &str,
    kind: &str,
    plural: &str,
) -> Api<DynamicObject> {
    let kind = GroupVersionKind::gvk(group, version, kind);
    Api::namespaced_with(client.clone(), namespace, &ApiResource::from_gvk_with_plural(&kind, plural))
}

fn entries(client: &Client, namespace: usize) -> Api<DynamicObject> {
    objects(client, &format!("n{namespace}"), "networking.istio.io", "v1", "ServiceEntry", "serviceentries")
}

fn pods(client: &Client, namespace: usize) -> Api<DynamicObject> {
    objects(client, &format!("n{namespace}"), "", "v1", "Pod", "pods")
}

/// The entry `number` opens an address that nobody else does, and so many versions of it.
fn entry(name: &str, address: &str) -> Result<DynamicObject> {
    Ok(serde_json::from_value(json!({
        "apiVersion": "networking.istio.io/v1", "kind": "ServiceEntry", "metadata": { "name": name },
        "spec": {
            "hosts": [format!("{name}.example.com")], "addresses": [address], "exportTo": ["."], "location": "MESH_EXTERNAL",
            "ports": [{ "number": 443, "name": "tls", "protocol": "TLS" }],
        },
    }))?)
}

fn address(number: usize, version: u8) -> String {
    format!("10.{version}.{}.{}", number / 250, number % 250)
}

/// Makes everything; the uids of the pods, that in the namespace of the probe first.
async fn fill(client: &Client) -> Result<Vec<String>> {
    let namespaces = ApiResource::from_gvk(&GroupVersionKind::gvk("", "v1", "Namespace"));
    let namespaces: Api<DynamicObject> = Api::all_with(client.clone(), &namespaces);
    for number in 0..NAMESPACES {
        let object = json!({
            "apiVersion": "v1", "kind": "Namespace",
            "metadata": { "name": format!("n{number}"), "labels": { "egress.filter/mode": "enforce" } },
        });
        namespaces.create(&PostParams::default(), &serde_json::from_value(object)?).await?;
    }
    let mut tasks = JoinSet::new();
    for worker in 0..16 {
        let client = client.clone();
        tasks.spawn(async move {
            for number in (worker..ENTRIES).step_by(16) {
                let object = entry(&format!("e{number}"), &address(number, 0))?;
                entries(&client, number % NAMESPACES).create(&PostParams::default(), &object).await?;
            }
            let mut uids = Vec::new();
            for number in (worker..PODS).step_by(16) {
                uids.push((number, run(&pods(&client, number % NAMESPACES), &format!("p{number}")).await?));
            }
            anyhow::Ok(uids)
        });
    }
    let mut made = tasks.join_all().await.into_iter().collect::<Result<Vec<_>>>()?.concat();
    made.sort();
    Ok(made.into_iter().map(|(_, uid)| uid).collect())
}

/// Makes a pod that runs; its uid.
async fn run(pods: &Api<DynamicObject>, name: &str) -> Result<String> {
    let object = json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": { "name": name, "labels": { "app": name } },
        "spec": { "nodeName": "node", "containers": [{ "name": "app", "image": "app" }] },
    });
    let made = pods.create(&PostParams::default(), &serde_json::from_value(object)?).await?;
    let status = json!({ "status": {
        "phase": "Running", "podIP": "10.0.0.1",
        "containerStatuses": [{
            "name": "app", "image": "app", "imageID": "", "ready": true, "restartCount": 0,
            "containerID": format!("containerd://{CONTAINER}"),
        }],
    }});
    pods.patch_status(name, &PatchParams::default(), &Patch::Merge(status)).await?;
    made.metadata.uid.context("the server gives a uid")
}

/// Changes entries and pods, of other names than the probe, until it is to stop.
async fn churn(client: &Client, stop: &AtomicBool, changes: &AtomicU32) -> Result<()> {
    let mut ticks = interval(Duration::from_secs(1) / CHURN);
    let mut tasks = JoinSet::new();
    for turn in 0.. {
        if stop.load(Ordering::Relaxed) {
            break;
        }
        ticks.tick().await;
        let (client, number, version) = (client.clone(), (turn * 7) % ENTRIES, u8::try_from(turn / 100 % 17 + 1)?);
        tasks.spawn(async move {
            let entries = entries(&client, number % NAMESPACES);
            match turn % 10 {
                0 => {
                    let labels = json!({ "metadata": { "labels": { "turn": turn.to_string() } } });
                    let number = turn / 10 % PODS;
                    let pods = pods(&client, number % NAMESPACES);
                    drop(pods.patch(&format!("p{number}"), &PatchParams::default(), &Patch::Merge(labels)).await?);
                }
                1 => drop(
                    entries
                        .create(&PostParams::default(), &entry(&format!("t{turn}"), &address(turn % ENTRIES, version))?)
                        .await?,
                ),
                2 if turn > 100 => {
                    let before = turn - 101;
                    let api = entries_of(&client, before);
                    drop(api.delete(&format!("t{before}"), &DeleteParams::default()).await?);
                }
                _ => {
                    let spec = json!({ "spec": { "addresses": [address(number, version)] } });
                    drop(entries.patch(&format!("e{number}"), &PatchParams::default(), &Patch::Merge(spec)).await?);
                }
            }
            anyhow::Ok(())
        });
        while let Some(done) = tasks.try_join_next() {
            done??;
            changes.fetch_add(1, Ordering::Relaxed);
        }
    }
    for done in tasks.join_all().await {
        done?;
    }
    Ok(())
}

/// Where the entry was made that a turn made.
fn entries_of(client: &Client, turn: usize) -> Api<DynamicObject> {
    entries(client, (turn * 7) % ENTRIES % NAMESPACES)
}

/// Opens one address after another, and waits until a process in a pod reaches it. Seconds.
async fn probe(client: &Client, actor: &mut Actor, number: u8) -> Result<Vec<f64>> {
    let entries = entries(client, 0);
    let name = format!("probe{number}");
    entries.create(&PostParams::default(), &entry(&name, "198.51.100.1")?).await?;
    let mut latencies = Vec::new();
    for probe in 0..PROBES {
        let to = format!("198.{number}.{probe}.1");
        let spec: Value = json!({ "spec": { "addresses": [to] } });
        entries.patch(&name, &PatchParams::default(), &Patch::Merge(spec)).await?;
        let (answered, to) = (Instant::now(), SocketAddr::new(to.parse()?, 443));
        while actor.dial_tcp(to)? == Err(Errno::PERM) {
            ensure!(answered.elapsed() < PATIENCE, "{to} stays closed");
            // The agent reports each refusal, which is not what is measured.
            thread::sleep(Duration::from_millis(1));
        }
        latencies.push(answered.elapsed().as_secs_f64());
        // Not in step with anything.
        tokio::time::sleep(Duration::from_millis(300 + 37 * (probe as u64 % 10))).await;
    }
    Ok(latencies)
}

fn summary(mut seconds: Vec<f64>) -> String {
    seconds.sort_by(f64::total_cmp);
    let at = |share: usize| 1000.0 * seconds[(seconds.len() - 1) * share / 100];
    format!("median {:.0} ms, 90 % {:.0} ms, longest {:.0} ms", at(50), at(90), at(100))
}

/// Seconds of a processor that the agent has used.
fn processor_time(agent: &Agent) -> Result<f64> {
    let stat = fs::read_to_string(format!("/proc/{}/stat", agent.pid()))?;
    let fields: Vec<&str> = stat.rsplit_once(')').context("a name in parentheses")?.1.split_whitespace().collect();
    // `utime` and `stime` are fields 14 and 15 of `proc_pid_stat(5)`; the third is the first here.
    let ticks = fields[11].parse::<u64>()? + fields[12].parse::<u64>()?;
    Ok(Duration::from_millis(1000 * ticks / rustix::param::clock_ticks_per_second()).as_secs_f64())
}

fn memory(agent: &Agent, place: &Place) -> Result<()> {
    let status = fs::read_to_string(format!("/proc/{}/status", agent.pid()))?;
    let of = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).map_or("?", str::trim).to_owned();
    let told = place.status()?.1;
    let maps: u64 = told["maps"].as_array().into_iter().flatten().filter_map(|map| map["bytes"].as_u64()).sum();
    let scopes = told["scopes"].as_array().map_or(0, Vec::len);
    println!(
        "agent: {} now, {} at most; maps in the kernel: {} kB, {scopes} scopes",
        of("VmRSS:"),
        of("VmHWM:"),
        maps / 1000
    );
    Ok(())
}
