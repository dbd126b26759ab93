//! What tracked IO does with a socket of tokio, if it is one.

use std::{
    any::Any,
    io::{
        self,
        ErrorKind::{Interrupted, WouldBlock},
        Read,
    },
    mem::MaybeUninit,
    task::Poll,
    time::Duration,
};

use socket2::SockRef;
#[cfg(unix)]
use tokio::net::UnixStream;
use tokio::{io::ReadBuf, net::TcpStream};

pub(super) fn tcp<I: 'static>(io: &I) -> Option<&TcpStream> {
    (io as &dyn Any).downcast_ref()
}

/// Takes the value out of the `Option`, if it is a `T`.
pub(super) fn take<T: 'static>(value: &mut dyn Any) -> Option<T> {
    value.downcast_mut::<Option<T>>()?.take()
}

/// The socket of a `TcpStream` or `UnixStream` of tokio.
fn socket<I: 'static>(io: &I) -> Option<SockRef<'_>> {
    #[cfg(unix)]
    if let Some(unix) = (io as &dyn Any).downcast_ref::<UnixStream>() {
        return Some(SockRef::from(unix));
    }
    tcp(io).map(SockRef::from)
}

/// Whether `io` is a `TcpStream` or `UnixStream` of tokio.
pub(super) fn is_socket<I: 'static>(io: &I) -> bool {
    socket(io).is_some()
}

/// Reads from the operating system directly, after the runtime has reported that there is nothing to
/// read.
///
/// A busy runtime may not have polled the operating system for milliseconds. An idle HTTP/1 connection
/// that is instructed to close is closed after this read, and a request that the read misses is lost.
pub(super) fn read_now<I: 'static>(io: &I, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
    let Some(socket) = socket(io) else {
        return Poll::Pending;
    };
    // Checked first, because most idle connections have nothing to read, and a read without unsafe code
    // writes zeros into the whole buffer, which makes its 8 KiB resident.
    let peeked = socket.peek(&mut [MaybeUninit::uninit()]);
    match peeked.and_then(|_| (&*socket).read(buf.initialize_unfilled())) {
        Ok(read) => {
            buf.advance(read);
            Poll::Ready(Ok(()))
        }
        Err(error) if matches!(error.kind(), WouldBlock | Interrupted) => Poll::Pending,
        // A socket reports the reset of its connection once, and then the end of the stream.
        Err(error) => Poll::Ready(Err(error)),
    }
}

/// Whether the kernel probes the peer while the connection is idle (`SO_KEEPALIVE`), as far as it tells.
pub(super) fn probes_idle_peer(tcp: &TcpStream) -> bool {
    SockRef::from(tcp).keepalive().unwrap_or(true)
}

/// Makes the drop of a TCP connection reset it.
pub(super) fn reset<I: 'static>(io: &I) {
    if let Some(tcp) = tcp(io) {
        let _ = SockRef::from(tcp).set_linger(Some(Duration::ZERO));
    }
}

/// Whether the peer has sent something that was not read.
pub(super) fn has_unread<I: 'static>(io: &I) -> bool {
    let peeked = socket(io).map(|socket| socket.peek(&mut [MaybeUninit::uninit()]));
    matches!(peeked, Some(Ok(bytes)) if bytes > 0)
}
