//! The daemon's process: a node, its API, `daemon.json`, and an orderly end.
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context, Result, anyhow, bail};
use capstan_api::door::{DoorListener, Reach};
use capstan_node::{Node, NodeConfig, Service};
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;

use crate::config::{Config, Source};
use crate::daemon_file::{DaemonFile, Lock};

/// Bytes of the management token: as hard to guess as a key.
const TOKEN_BYTES: usize = 32;

/// Runs the daemon until it is stopped. `ready` is told once it answers.
pub async fn run(config: &Config, ready: Option<oneshot::Sender<()>>) -> Result<ExitCode> {
    let data_dir = &config.data_dir.value;
    crate::os::create_private_dir(data_dir).with_context(|| {
        format!("the data folder {} cannot be made; choose another with --data-dir", data_dir.display())
    })?;
    let Some(_only_one) = Lock::Daemon.try_take(data_dir).context("the data folder cannot be locked")? else {
        bail!("a daemon is running in {} already; `capstan status` shows it", data_dir.display());
    };

    // The cheap thing that fails most often comes first.
    let (doors, api, listen) = open_doors(config).await?;
    let node = Node::start(node_config(config)?).await?;
    let token = hex::encode(rand::random::<[u8; TOKEN_BYTES]>());
    let mut options = capstan_api::ApiOptions::new(&token);
    options.no_auth = config.no_auth.value;
    let service: Arc<dyn Service> = node.clone();
    let router = capstan_api::router(service, options);

    let finish = CancellationToken::new();
    let serve = |door| capstan_api::serve(door, router.clone(), finish.clone().cancelled_owned());
    let mut serving = tokio::spawn(futures::future::try_join_all(doors.into_iter().map(serve).collect::<Vec<_>>()));
    let version = env!("CARGO_PKG_VERSION").into();
    let file = DaemonFile { pid: std::process::id(), api, listen, token, version };
    file.write(data_dir).with_context(|| format!("{} cannot be written to", data_dir.display()))?;
    tracing::info!(name = node.name(), %api, pid = file.pid, "the daemon is up");
    if let Some(listen) = listen {
        // The keys travel in the clear over HTTP: a proxy in front adds TLS.
        match config.no_auth.value {
            true => {
                tracing::warn!("the API listens on {listen} and asks for no key: whoever reaches it may use the models")
            }
            false => tracing::info!("the API listens on {listen} and demands an API key (`capstan key add NAME`)"),
        }
    }
    if let Some(ready) = ready {
        ready.send(()).ok();
    }

    let outcome = tokio::select! {
        signal = crate::os::shutdown_signal() => {
            tracing::info!("{} came: stopping; a second one cuts answers in progress off", signal?);
            tokio::select! {
                () = node.stop() => {}
                signal = crate::os::shutdown_signal() => {
                    tracing::info!("{} came: stopping now", signal?);
                    node.stop_now().await;
                }
            }
            Ok(())
        }
        () = node.stopped() => Ok(()),
        served = &mut serving => {
            node.stop().await;
            let why = flatten(served).err().unwrap_or_else(|| anyhow!("nothing told it to"));
            Err(why.context("the API ended unexpectedly"))
        }
    };
    finish.cancel();
    let outcome = match outcome {
        // Answers in flight get a bounded grace; then their connections are closed.
        Ok(()) => flatten(serving.await).context("the API did not end in order"),
        Err(e) => Err(e),
    };
    if let Err(e) = file.remove(data_dir) {
        tracing::warn!("daemon.json could not be removed: {e}");
    }
    tracing::info!("the daemon has stopped");
    outcome.map(|()| ExitCode::SUCCESS)
}

fn flatten(served: Result<std::io::Result<Vec<()>>, tokio::task::JoinError>) -> Result<()> {
    served??;
    Ok(())
}

fn node_config(config: &Config) -> Result<NodeConfig> {
    let exe = std::env::current_exe().context("the path of this program is unknown, so no stage can be started")?;
    let level = format!("--log-level={}", config.log_level.value);
    let format = format!("--log-format={}", config.log_format.value);
    let command = [exe.into_os_string(), "compute".into(), level.into(), format.into()];
    Ok(NodeConfig {
        // Unless it was chosen, a node keeps the name it had: another node may have had the host's.
        name: (config.name.source != Source::Default).then(|| config.name.value.clone()),
        bind_addr: config.bind_addr.value,
        threads: config.threads.value.0,
        memory_limit_bytes: config.memory_limit.value.0,
        disk_limit_bytes: config.disk_limit.value.0,
        snapshot_limit_bytes: config.snapshot_limit.value.bytes(),
        memory_dir: crate::os::memory_dir(),
        gpu_layers: config.gpu_layers.value,
        measure: config.measure.value.is_on(),
        mdns: !config.no_mdns.value,
        ..NodeConfig::new(config.data_dir.value.clone(), command.to_vec())
    })
}

/// Opens this machine's door and, with `--listen`, the network's. Says where a command finds the first, and where the
/// second is.
async fn open_doors(config: &Config) -> Result<(Vec<DoorListener>, SocketAddr, Option<SocketAddr>)> {
    let (own, listen) = (config.api_addr.value, config.listen.value.0);
    // Every address at the same port is this machine's, too: then one socket is both doors.
    if let Some(all) = listen.filter(|l| l.ip().is_unspecified() && l.port() == own.port() && l.port() != 0) {
        let both = bind_api(all, "listen").await?;
        let api = dialled(both.local_addr()?);
        return Ok((vec![DoorListener::new(both, Reach::Shared)], api, Some(all)));
    }
    let local = bind_api(own, "api_addr").await?;
    let api = local.local_addr()?;
    let mut doors = vec![DoorListener::new(local, Reach::Local)];
    let Some(addr) = listen else { return Ok((doors, api, None)) };
    let network = bind_api(addr, "listen").await?;
    let bound = network.local_addr()?;
    doors.push(DoorListener::new(network, Reach::Network));
    Ok((doors, api, Some(bound)))
}

async fn bind_api(addr: SocketAddr, key: &str) -> Result<TcpListener> {
    let (flag, variable) = (key.replace('_', "-"), key.to_uppercase());
    let other = format!(
        "choose another with --{flag} IP:PORT, CAPSTAN_{variable} or {key} in the config file (port 0 lets the system \
         choose)"
    );
    TcpListener::bind(addr).await.map_err(|e| match e.kind() {
        std::io::ErrorKind::AddrInUse => {
            anyhow!("port {} on {} is taken by another program; {other}", addr.port(), addr.ip())
        }
        std::io::ErrorKind::AddrNotAvailable => anyhow!("{} is no address of this machine; {other}", addr.ip()),
        std::io::ErrorKind::PermissionDenied => anyhow!("port {} may not be opened by this user; {other}", addr.port()),
        _ => anyhow!("the API cannot listen on {addr} ({e}); {other}"),
    })
}

/// The address at which a command on this machine reaches the listener: "every interface" cannot be dialled.
fn dialled(local: SocketAddr) -> SocketAddr {
    let ip = match local.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(ip) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
        ip => ip,
    };
    SocketAddr::new(ip, local.port())
}
