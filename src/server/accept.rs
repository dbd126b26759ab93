//! Accepts connections, and serves each of them in its own task.

use std::{any::Any, convert::Infallible, future::poll_fn, pin::pin, sync::Arc};

use axum::{extract::Request, response::Response, serve::Listener};
use tokio::{sync::mpsc, task::JoinSet};
use tower_service::Service;

use super::{
    accepted::Accepted, connection, io::GracefulIo, listener::GracefulListener, settings::Settings,
    tracked,
};
use crate::{
    background::shielded, handle::graceful::Graceful, shutdown::state::ClosingStage,
    waiting::shielded_wait::ShieldedWait,
};

/// Where connections come from.
pub(super) enum Source<L: Listener> {
    Untracked(GracefulListener<L>),
    /// The listener's connections are tracked already.
    Tracked(L, tracked::Find),
}

impl<L: Listener> Source<L> {
    pub(super) fn new(graceful: &Graceful, listener: L) -> Self {
        match tracked::finder::<L::Io>() {
            Some(find) => Self::Tracked(listener, find),
            None => Self::Untracked(GracefulListener::within(graceful.clone(), listener)),
        }
    }

    async fn accept(&mut self, graceful: &Graceful) -> (GracefulIo<L::Io>, L::Addr) {
        match self {
            Self::Untracked(listener) => listener.accept().await,
            Self::Tracked(listener, find) => {
                let (io, addr) = listener.accept().await;
                let io = match find(&io) {
                    // Wrapped as a new layer: the server reads the IO that a handshake has returned.
                    Some(entry) if entry.owner.address() == graceful.shared().address() => {
                        GracefulIo::above(io, &entry)
                    }
                    // Tracked by another lifecycle, or untracked.
                    _ => {
                        let peer = (&addr as &dyn Any).downcast_ref().copied();
                        GracefulIo::new(graceful, io, peer, None)
                    }
                };
                (io, addr)
            }
        }
    }
}

/// Accepts and serves connections until they are to be closed, and then waits until all are closed.
pub(super) async fn accept<L, M, S>(
    mut listener: Source<L>,
    mut app: M,
    settings: Arc<Settings>,
    graceful: Graceful,
) where
    L: Listener,
    M: for<'a> Service<Accepted<'a, L>, Error = Infallible, Response = S> + Send + 'static,
    for<'a> <M as Service<Accepted<'a, L>>>::Future: Send,
    S: Service<Request, Response = Response, Error = Infallible> + Clone + Send + 'static,
    S::Future: Send,
{
    let mut closing_stages = graceful.shared().closing_stages();
    let closes =
        closing_stages.wait_for(|closing_stage| *closing_stage >= ClosingStage::Connections);
    let mut closing = pin!(ShieldedWait::new(closes));
    let mut connections = JoinSet::new();
    // Each connection has a sender, so that the end of the last one is known without a wake for each of the others.
    let (running, mut all_ended) = mpsc::channel::<Infallible>(1);
    'accepting: loop {
        let (io, remote_addr) = {
            // The future is kept until it is ready, because a listener of the user may be in the middle of
            // a handshake, and dropping the future would lose that connection.
            let mut accept = pin!(listener.accept(&graceful));
            loop {
                tokio::select! {
                    accepted = &mut accept => break accepted,
                    // A panic in one connection does not affect the others, nor does the destructor of
                    // what it has panicked with.
                    Some(ended) = connections.join_next() => shielded(|| drop(ended)),
                    _ = &mut closing => break 'accepting,
                }
            }
        };
        let Ok(()) = poll_fn(|cx| app.poll_ready(cx)).await;
        let Ok(service) = app.call(Accepted::new(io.get_ref(), remote_addr)).await;
        connections.spawn(connection::serve(io, service, &settings, running.clone()));
        // Each one that has ended takes memory until then, and new ones may come without a pause.
        while let Some(ended) = connections.try_join_next() {
            shielded(|| drop(ended));
        }
    }
    drop((listener, running));
    // The last sender may be dropped by a panic of its connection. A waker that panics there as well would
    // abort the process.
    ShieldedWait::new(all_ended.recv()).await;
}
