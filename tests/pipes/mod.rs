//! A listener without a network, so that the clock can be paused.

use std::{future, io};

use axum::serve::Listener;
use tokio::{
    io::{AsyncRead, AsyncWrite, DuplexStream},
    sync::mpsc,
};

/// Accepts the connections that a test sends to it.
pub(crate) struct Pipes<Io = DuplexStream>(pub(crate) mpsc::UnboundedReceiver<Io>);

impl<Io: AsyncRead + AsyncWrite + Unpin + Send + 'static> Listener for Pipes<Io> {
    type Io = Io;
    type Addr = ();

    async fn accept(&mut self) -> (Io, ()) {
        match self.0.recv().await {
            Some(io) => (io, ()),
            None => future::pending().await,
        }
    }

    fn local_addr(&self) -> io::Result<()> {
        Ok(())
    }
}
