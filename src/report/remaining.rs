//! The numbers and lists of what was cut or lost, and the numbers of requests.

use std::{fmt, net::SocketAddr, time::Duration};

use http::Method;

/// What was open when the cut came, what did not end even after the cut, and what was lost without a
/// cut. All zero after a clean shutdown.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub struct Remaining {
    /// Requests in flight.
    pub requests: usize,
    /// [Holds](crate::Hold).
    pub holds: usize,
    /// Tracked connections, upgraded ones included. A connection also counts if its server dropped the rest
    /// of a response. hyper may do that if the client has asked for an upgrade, such as to h2c, and did not
    /// get one. (On servers other than [`serve`](crate::Graceful::serve) only the first requests of a connection
    /// are checked for an upgrade.) It also counts if the operating system gave up its client before the client
    /// had received everything, or if its runtime ended before that, or if it was upgraded and its handler dropped
    /// it before that. Such connections are not in
    /// [`Report::connections_cut`](crate::Report::connections_cut). A connection on which no response was written
    /// since the trigger does not count if its client has vanished (on Linux: after three retransmissions without an
    /// answer). It is closed then, and the operating system goes on sending.
    pub connections: usize,
    /// Servers, of [`Graceful::serve`](crate::Graceful::serve) or passed to
    /// [`Graceful::run`](crate::Graceful::run), that did not end even after their connections had been
    /// cut, and were dropped.
    pub servers: usize,
    /// [Workers](crate::Graceful::worker) that were cut at the end of
    /// [`worker_timeout`](crate::GracefulBuilder::worker_timeout), or dropped because their runtime shut down, also before
    /// the stop.
    pub workers: usize,
    /// Connections that were reset in a listener's queue, because the process had no file
    /// descriptor left to accept them, or did not run until the drain deadline had passed; and connections
    /// that were accepted after everything was cut. Requests sent on them were not answered. This is a
    /// lower bound: a listener whose queue could not be counted adds 1.
    pub queued: usize,
    /// HTTP/1 requests that were dropped during the shutdown because their clients had closed their
    /// writing side before there was a response. Such a client may have left, or may still have
    /// been waiting: see [`half_close`](crate::Serve::half_close).
    ///
    /// On a server of [`serve`](crate::Graceful::serve) each such request counts. On other servers
    /// only the bytes of a [tracked](crate::Graceful::track) connection are known. There a request
    /// counts if it is the last on its connection and its bytes end in an empty line, as those of a
    /// request without a body or with a chunked body do. Over TLS no request counts there.
    /// Requests for the [probes](crate::Graceful::probes) that arrive during the stop do not count: a
    /// prober that has given up waiting has lost nothing. Requests that arrive while draining do not count
    /// either, because they would be refused. Requests over HTTP/2 do not count: a client that closes the writing
    /// side of the connection gives up its streams, and h2 drops what they still wait to send.
    pub half_closed: usize,
}

impl Remaining {
    pub(crate) fn is_nothing(self) -> bool {
        self == Self::default()
    }
}

impl fmt::Display for Remaining {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let named = [
            (self.requests, "request"),
            (self.holds, "hold"),
            (self.connections, "connection"),
            (self.servers, "server"),
            (self.workers, "worker"),
            (self.queued, "queued connection"),
            (self.half_closed, "half-closed request"),
        ];
        let mut first = true;
        for (count, name) in named {
            if count > 0 {
                let comma = if first { "" } else { ", " };
                let plural = if count == 1 { "" } else { "s" };
                write!(f, "{comma}{count} {name}{plural}")?;
                first = false;
            }
        }
        if first {
            f.write_str("nothing")?;
        }
        Ok(())
    }
}

/// The numbers of requests by what happened to them, from the trigger on.
///
/// Requests that are not counted as in flight, to probes and
/// [exempt](crate::GracefulBuilder::exempt) paths, are not included, and neither are
/// [holds](crate::Hold).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub struct Requests {
    /// Requests that were in flight at the trigger.
    pub in_flight: usize,
    /// Requests admitted after the trigger, in the lame-duck phase.
    pub admitted: usize,
    /// Requests out of `in_flight` and `admitted` that were completed: the server has taken the
    /// whole response, or the client has left after the response had begun. A service that returns an error
    /// has completed its request too: middleware outside the layer makes a response of the error.
    pub finished: usize,
    /// Requests rejected after the trigger, because of draining or because of the limit.
    pub refused: usize,
    /// Requests that were still in flight at the cut, or whose response was not wholly received by
    /// the client, as far as the operating system reports it: see [`CutConnection::undelivered`].
    /// Responses over HTTP/2 that wait in the server, because the window of the client is full, are
    /// included. On servers other than [`serve`](crate::Graceful::serve) such responses count at most once
    /// for each connection, so some of them may be in `finished`.
    pub cut: usize,
    /// Requests that ended without a whole response: they were dropped before they had a response, by
    /// their clients or by middleware outside the layer, or their response body failed or panicked.
    /// They are not in `finished`. Requests that were dropped because of the cut are only in `cut`.
    pub dropped: usize,
}

/// A request that was in flight when the cut came. See [`Report::requests_cut`](crate::Report::requests_cut).
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub struct CutRequest {
    /// The method.
    #[cfg_attr(feature = "serde", serde(serialize_with = "super::json::method"))]
    pub method: Method,
    /// The path, without the query.
    pub path: String,
    /// How long it had been in flight.
    #[cfg_attr(feature = "serde", serde(serialize_with = "super::json::seconds"))]
    pub age: Duration,
    /// Whether the head of the response had been passed to the server, and its body had not ended.
    pub streaming: bool,
}

impl fmt::Display for CutRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = if self.streaming {
            "body streaming"
        } else {
            "no response yet"
        };
        let path = self.path.escape_default();
        write!(
            f,
            "{} {path} {:.1} s, {state}",
            self.method,
            self.age.as_secs_f64()
        )
    }
}

/// A hold that was active when the cut came. See [`Report::holds_cut`](crate::Report::holds_cut).
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub struct CutHold {
    /// The name of the hold.
    pub name: String,
    /// How long it had been active.
    #[cfg_attr(feature = "serde", serde(serialize_with = "super::json::seconds"))]
    pub age: Duration,
}

impl fmt::Display for CutHold {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = self.name.escape_default();
        write!(f, "hold {name} {:.1} s", self.age.as_secs_f64())
    }
}

/// A connection that was open when the cut came. See
/// [`Report::connections_cut`](crate::Report::connections_cut).
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub struct CutConnection {
    /// The address of the peer, if it is known: the address that was set with
    /// [`set_peer`](crate::GracefulIo::set_peer), if any. Otherwise it is the remote address of a `TcpStream`
    /// that was passed to [`Graceful::track`](crate::Graceful::track), or the address that a listener
    /// returned, if that is a `SocketAddr`.
    pub peer: Option<SocketAddr>,
    /// How long it had been open.
    #[cfg_attr(feature = "serde", serde(serialize_with = "super::json::seconds"))]
    pub age: Duration,
    /// The number of written bytes that the peer had not acknowledged, including the overhead of
    /// TLS and HTTP. Known on Linux, for a connection whose IO is a `TcpStream`; 0 otherwise. Bytes
    /// that have not been written, such as those for which the client has no HTTP/2 window, are not
    /// included. They may belong to a response that was written before the trigger, which is in no figure of
    /// [`Requests`].
    pub undelivered: u64,
}

impl fmt::Display for CutConnection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.peer {
            Some(peer) => write!(f, "connection from {peer}")?,
            None => f.write_str("connection from a peer without an address")?,
        }
        write!(f, " {:.1} s", self.age.as_secs_f64())?;
        if self.undelivered > 0 {
            write!(f, ", {} bytes undelivered", self.undelivered)?;
        }
        Ok(())
    }
}
