//! The node's socket: QUIC by key, relays and public look-up off.
use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use capstan_proto::NodeId;
use capstan_proto::control::ADDRS_MAX;
use iroh::endpoint::{PortmapperConfig, QuicTransportConfig, VarInt, presets};
use iroh::{Endpoint, EndpointAddr, EndpointId, RelayMode, SecretKey, TransportAddr};
use serde::{Deserialize, Serialize};

use crate::error::NodeError;
use crate::files;

/// How long a connection may be silent before it counts as lost, in milliseconds. A machine that is switched off says
/// nothing; six times the interval of keep-alives does not mistake a loaded machine for one.
const IDLE_MS: u32 = 6000;
/// How often a silent connection is kept alive.
const KEEP_ALIVE: Duration = Duration::from_secs(1);
/// Most requests at once on one connection: generations in flight, with room for control.
const STREAMS_MAX: u32 = 1024;

#[derive(Serialize, Deserialize)]
struct LastPort {
    port: u16,
}

/// Binds the endpoint. With port 0 the port of the last start is tried first, so that other nodes find this one again.
pub(crate) async fn bind(key: SecretKey, addr: SocketAddr, data_dir: &Path) -> Result<Endpoint, NodeError> {
    let memory = data_dir.join("endpoint.json");
    let last = if addr.port() == 0 { files::read_json::<LastPort>(&memory).ok().flatten() } else { None };
    let endpoint = match last {
        Some(last) => match bind_once(key.clone(), SocketAddr::new(addr.ip(), last.port)).await {
            Ok(endpoint) => endpoint,
            Err(error) => {
                tracing::debug!(%error, "the last port is not free, any other is taken");
                bind_once(key, addr).await?
            }
        },
        None => bind_once(key, addr).await?,
    };
    if let Some(bound) = endpoint.bound_sockets().first() {
        // Without it the node only has another port next time.
        if let Err(error) = files::write_json(&memory, &LastPort { port: bound.port() }) {
            tracing::warn!(%error, "the port could not be noted");
        }
    }
    Ok(endpoint)
}

async fn bind_once(key: SecretKey, addr: SocketAddr) -> Result<Endpoint, NodeError> {
    // iroh reports "address in use" as one opaque error among others, so the port is tried first.
    if addr.port() != 0
        && let Err(error) = std::net::UdpSocket::bind(addr)
    {
        return Err(match error.kind() {
            std::io::ErrorKind::AddrInUse => NodeError::PortTaken { addr },
            _ => NodeError::Network { addr, reason: error.to_string() },
        });
    }
    let network = |reason: String| NodeError::Network { addr, reason };
    let transport = QuicTransportConfig::builder()
        .max_idle_timeout(Some(VarInt::from_u32(IDLE_MS).into()))
        .keep_alive_interval(KEEP_ALIVE)
        .default_path_keep_alive_interval(KEEP_ALIVE)
        .max_concurrent_bidi_streams(VarInt::from_u32(STREAMS_MAX))
        .build();
    Endpoint::builder(presets::Minimal)
        .secret_key(key)
        .relay_mode(RelayMode::Disabled)
        .clear_address_lookup()
        .portmapper_config(PortmapperConfig::Disabled)
        .transport_config(transport)
        .clear_ip_transports()
        .bind_addr(addr)
        .map_err(|e| network(e.to_string()))?
        .bind()
        .await
        .map_err(|e| network(e.to_string()))
}

/// Where the endpoint is dialled.
pub(crate) fn addrs(endpoint: &Endpoint) -> Vec<SocketAddr> {
    let bound = endpoint.bound_sockets();
    if bound.iter().all(|a| !a.ip().is_unspecified()) {
        return bound;
    }
    let mut addrs: Vec<_> = endpoint.addr().ip_addrs().copied().collect();
    if addrs.is_empty() {
        // The interfaces are not known yet, in the first moments after the start.
        addrs = bound.iter().map(|a| SocketAddr::new(std::net::Ipv4Addr::LOCALHOST.into(), a.port())).collect();
    }
    addrs.truncate(ADDRS_MAX);
    addrs
}

/// The address to dial a node by; none when the key is no point of the curve.
pub(crate) fn dial_addr(id: NodeId, addrs: &[SocketAddr]) -> Option<EndpointAddr> {
    let id = EndpointId::from_bytes(&id.0).ok()?;
    Some(EndpointAddr::from_parts(id, addrs.iter().copied().map(TransportAddr::Ip)))
}

/// The node that an endpoint's key names.
pub(crate) fn node_id(id: EndpointId) -> NodeId {
    NodeId(*id.as_bytes())
}
