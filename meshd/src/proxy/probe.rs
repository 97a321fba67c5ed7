//! Finds out when an endpoint that failed is there again, without risking a connection of an application.

use std::rc::Rc;

use meshd_discovery::Endpoint;
use meshd_identity::SpiffeId;

use super::balance::Failed;
use super::connect::pool_key;
use super::env::Env;
use crate::fault::Fault;
use crate::lifecycle::Stage;

/// Probes `failed` in the background until it answers, is gone, or we drain.
pub(super) fn start(env: &Rc<Env>, source: &SpiffeId, failed: Failed) {
    let (env, source) = (env.clone(), source.clone());
    tokio::task::spawn_local(async move {
        let mut lifecycle = env.lifecycle.clone();
        tokio::select! {
            () = until_it_answers(&env, &source, failed) => {}
            () = lifecycle.reached(Stage::Draining) => {}
        }
    });
}

async fn until_it_answers(env: &Env, source: &SpiffeId, failed: Failed) {
    while let Some(pause) = failed.pause() {
        // Up to a quarter more, so that the workers of many hosts do not knock at the same moment.
        tokio::time::sleep(pause.mul_f64(1.0 + fastrand::f64() / 4.0)).await;
        let Some(endpoint) = failed.endpoint() else { return };
        match probe(env, source, &endpoint).await {
            Ok(()) => return failed.recovered(),
            Err(_) => failed.still_failing(),
        }
    }
}

/// A connection to the peer, which stays in the pool for whoever comes next.
async fn probe(env: &Env, source: &SpiffeId, endpoint: &Endpoint) -> Result<(), Fault> {
    match pool_key(source, endpoint) {
        Some(key) => env.pool.checkout(&env.dialer, &env.shared.tls.load_full(), &key).await.map(drop),
        None => env.dialer.tcp(endpoint.dial).await.map(drop),
    }
}
