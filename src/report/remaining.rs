//! What was there when time was up, and what became of the requests.

use std::{fmt, net::SocketAddr, time::Duration};

use http::Method;

/// What was still there when the cut came, and what was lost without one. All zero after a clean
/// shutdown.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub struct Remaining {
    /// Requests in flight.
    pub requests: usize,
    /// [Holds](crate::Hold).
    pub holds: usize,
    /// Tracked connections, upgraded ones included.
    pub connections: usize,
    /// Servers given to [`Graceful::run`](crate::Graceful::run) that had not ended.
    pub servers: usize,
    /// [Workers](crate::Graceful::worker) that were cut when their own time was over.
    pub workers: usize,
    /// Connections that were reset in a listener's queue, because the process had no file
    /// descriptor left to accept them. Their requests, if any were sent, were not answered. At
    /// least so many: a listener whose queue could not be counted adds 1.
    pub queued: usize,
    /// Requests over HTTP/1 that were dropped during the shutdown because their clients had closed
    /// their writing side before there was a response. Such a client may have left, or may still
    /// have waited: see [`half_close`](crate::Serve::half_close).
    ///
    /// On a server of [`serve`](crate::Graceful::serve) each such request counts. On other servers
    /// the bytes of a [tracked](crate::Graceful::track) connection are all that is known: a request
    /// counts when it is the last on its connection and its bytes end in an empty line, as those of
    /// a request without a body or with a chunked one do, and not over TLS.
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

/// What became of the requests, from the moment the stop was asked for. Requests that were let
/// pass uncounted, to probes and [exempt](crate::GracefulBuilder::exempt) paths, are not among
/// them, and neither are [holds](crate::Hold).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub struct Requests {
    /// In flight when the stop was asked for.
    pub in_flight: usize,
    /// Let in after that, in the lame-duck phase.
    pub admitted: usize,
    /// Of these, how many were answered: the server has taken the whole response, or the client has
    /// disconnected after the response had begun.
    pub finished: usize,
    /// Refused after that, while draining or above the limit.
    pub refused: usize,
    /// Still in flight when the time was over, or not wholly received by their clients, as far as the
    /// operating system says so: see [`CutConnection::undelivered`].
    pub cut: usize,
    /// Ended without a whole response: dropped before there was a response, by the client or by
    /// middleware outside the layer, or the response body failed or panicked. Not among `finished`.
    /// Requests that ended because of the cut are in `cut` alone.
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
    /// The head of the response was out, and its body was not at its end.
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

/// A hold that was there when the cut came. See [`Report::holds_cut`](crate::Report::holds_cut).
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub struct CutHold {
    /// The name it was given.
    pub name: String,
    /// How long it had been held.
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
    /// Who was at the other end, where the listener's addresses are `SocketAddr`s. `None` for
    /// other listeners, and for IO given to [`Graceful::track`](crate::Graceful::track).
    pub peer: Option<SocketAddr>,
    /// How long it had been open.
    #[cfg_attr(feature = "serde", serde(serialize_with = "super::json::seconds"))]
    pub age: Duration,
    /// How many bytes of what had been written the peer had not acknowledged, with what TLS and HTTP
    /// add to a response. Known on Linux, for a connection whose IO is a `TcpStream`; 0 otherwise.
    pub undelivered: u64,
}

impl fmt::Display for CutConnection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.peer {
            Some(peer) => write!(f, "connection from {peer}")?,
            None => f.write_str("connection from a peer without address")?,
        }
        write!(f, " {:.1} s", self.age.as_secs_f64())?;
        if self.undelivered > 0 {
            write!(f, ", {} bytes undelivered", self.undelivered)?;
        }
        Ok(())
    }
}
