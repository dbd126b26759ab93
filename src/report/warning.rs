//! Warnings about setups that cannot work as intended.

use std::{fmt, net::SocketAddr, time::Duration};

use http::Method;

/// A setup that cannot work as intended. See [`Report::warnings`](crate::Report::warnings).
///
/// Its `Display` form states the problem, where it was found, and the fix.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Warning {
    /// Requests were served, and none of them reached the [layer](crate::Graceful::layer) of this
    /// lifecycle. `.layer(…)` is missing, or belongs to another [`Graceful`](crate::Graceful).
    /// Contains one of the requests.
    NoRequestInLayer(OutsideLayer),
    /// Some requests reached the layer, and this request was served without it. Its route, or the
    /// middleware that answered it, was added after `.layer(…)`.
    RequestOutsideLayer(OutsideLayer),
    /// Upgraded connections were open while draining, and no [`Hold`](crate::Hold) was left, so the
    /// drain did not wait for their handlers. Oldest first.
    ///
    /// A WebSocket over HTTP/2 ([RFC 8441](https://www.rfc-editor.org/rfc/rfc8441)) is one stream of its
    /// connection. [`serve`](crate::Graceful::serve) knows such streams. With axum's own server they need a hold
    /// as well, and there is no warning about them.
    UpgradesNotHeld(Vec<UpgradedConnection>),
}

/// A request that was answered without the layer. See [`Warning`].
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub struct OutsideLayer {
    /// The method.
    #[cfg_attr(feature = "serde", serde(serialize_with = "super::json::method"))]
    pub method: Method,
    /// The path, without the query.
    pub path: String,
    /// The peer of its connection, if known.
    pub peer: Option<SocketAddr>,
}

/// A connection, or a stream of an HTTP/2 connection, that was upgraded from HTTP to another protocol.
/// See [`Warning`].
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub struct UpgradedConnection {
    /// The path of the request that asked for the upgrade, without the query, if known.
    pub path: Option<String>,
    /// The peer, if known.
    pub peer: Option<SocketAddr>,
    /// How long ago the upgrade was requested.
    #[cfg_attr(feature = "serde", serde(serialize_with = "super::json::seconds"))]
    pub age: Duration,
}

/// How many connections the text names.
const NAMED: usize = 3;

impl fmt::Display for Warning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoRequestInLayer(request) => write!(
                f,
                "no request has reached the layer, although {request} was answered: requests are \
                 not counted, and the drain neither waits for them nor rejects them; add `.layer(graceful.layer())`, of the \
                 same `Graceful` that serves or tracks the connections"
            ),
            Self::RequestOutsideLayer(request) => write!(
                f,
                "{request} was answered outside the layer: such requests are not counted, and the \
                 drain neither waits for them nor rejects them; add the route before `.layer(…)`, or give its path to `exempt`"
            ),
            Self::UpgradesNotHeld(connections) => {
                match &**connections {
                    [_] => f.write_str("an upgraded connection has no `Hold`: ")?,
                    all => write!(f, "{} upgraded connections have no `Hold`: ", all.len())?,
                }
                let mut separator = "";
                for connection in connections.iter().take(NAMED) {
                    write!(f, "{separator}{connection}")?;
                    separator = ", ";
                }
                let more = connections.len().saturating_sub(NAMED);
                if more > 0 {
                    write!(f, ", and {more} more")?;
                }
                f.write_str(
                    "; the drain does not wait for the handler, and at the drain deadline the \
                     connection is cut; take `graceful.hold(…)` before the upgrade, end the handler \
                     when `graceful.draining()` resolves, and close with `Hold::close_socket`",
                )
            }
        }
    }
}

fn from(f: &mut fmt::Formatter<'_>, peer: Option<SocketAddr>) -> fmt::Result {
    peer.map_or(Ok(()), |peer| write!(f, " from {peer}"))
}

impl fmt::Display for OutsideLayer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.method, self.path.escape_default())?;
        from(f, self.peer)
    }
}

impl fmt::Display for UpgradedConnection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.path {
            Some(path) => write!(f, "{}", path.escape_default())?,
            None => f.write_str("an unknown path")?,
        }
        from(f, self.peer)
    }
}
