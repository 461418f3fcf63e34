//! What the way to the target carries.

use super::super::move_error::MoveError;
use super::peer::Peer;
use super::steps::READY_PATIENCE;
use std::io::Write;
use std::time::{Duration, Instant};
use sterna_migration::wire::{ToSource, ToTarget};

/// Bytes of the first probe of the way, and of the second where that was quick.
const PROBES: [u64; 2] = [1 << 20, 32 << 20];
/// A probe that took longer says enough.
const QUICK_PROBE: Duration = Duration::from_millis(20);

/// What the way carries, bytes a second, by sending nothing over it.
pub(super) fn probe(peer: &Peer, off: impl Fn() -> Option<MoveError>) -> Result<u64, MoveError> {
    let nothing = vec![0; 1 << 20];
    let mut bandwidth = 0;
    for bytes in PROBES {
        let began = Instant::now();
        peer.send(&ToTarget::Probe { bytes })?;
        for _ in 0..bytes >> 20 {
            let mut out = peer.socket();
            out.write_all(&nothing).map_err(MoveError::host("send a probe"))?;
        }
        let ToSource::Probed = peer.receive("the end of a probe", READY_PATIENCE, &off)? else {
            return Err(MoveError::Unexpected { peer: "the target", wanted: "the end of a probe" });
        };
        let took = began.elapsed();
        bandwidth = (bytes as f64 / took.as_secs_f64()) as u64;
        if took > QUICK_PROBE {
            break;
        }
    }
    Ok(bandwidth)
}

/// How long `bytes` take at so many bytes a second.
pub(super) fn transfer_time(bytes: u64, bandwidth: u64) -> Duration {
    Duration::from_secs_f64(bytes as f64 / bandwidth.max(1) as f64)
}
