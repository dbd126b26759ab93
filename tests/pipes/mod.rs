//! A listener without a network, so that the clock can be paused.

use std::{future, io};

use axum::serve::Listener;
use tokio::{io::DuplexStream, sync::mpsc};

/// Accepts the connections that a test sends to it.
pub(crate) struct Pipes(pub(crate) mpsc::UnboundedReceiver<DuplexStream>);

impl Listener for Pipes {
    type Io = DuplexStream;
    type Addr = ();

    async fn accept(&mut self) -> (DuplexStream, ()) {
        match self.0.recv().await {
            Some(pipe) => (pipe, ()),
            None => future::pending().await,
        }
    }

    fn local_addr(&self) -> io::Result<()> {
        Ok(())
    }
}
