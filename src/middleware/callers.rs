//! Which callers of the preStop route are allowed: by their address, and not through a proxy.

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use http::{HeaderName, Request};

use super::peer;

/// Header fields that proxies add to the requests that they forward.
const ADDED_BY_PROXIES: [&str; 5] = [
    "forwarded",
    "via",
    "x-real-ip",
    "true-client-ip",
    "cf-connecting-ip",
];

/// How the names of further such fields begin: those of most proxies, of Envoy, and of Linkerd.
const PREFIXES_OF_PROXIES: [&str; 3] = ["x-forwarded-", "x-envoy-", "l5d-"];

type AllowedIf = Arc<dyn Fn(IpAddr) -> bool + Send + Sync>;

/// The callers that are allowed in addition to loopback.
#[derive(Clone, Default)]
pub(super) struct Callers {
    pub(super) addresses: Arc<[IpAddr]>,
    allowed_if: Option<AllowedIf>,
}

impl Callers {
    /// Adds addresses.
    pub(super) fn allow(&mut self, addresses: impl IntoIterator<Item = IpAddr>) {
        let addresses = addresses.into_iter().map(|it| it.to_canonical());
        self.addresses = self.addresses.iter().copied().chain(addresses).collect();
    }

    /// Replaces the function that allows further addresses.
    pub(super) fn allow_if(&mut self, allowed: impl Fn(IpAddr) -> bool + Send + Sync + 'static) {
        self.allowed_if = Some(Arc::new(allowed));
    }

    /// Returns the peer if it is allowed, and otherwise the reason for the 403.
    pub(super) fn caller<B>(&self, request: &Request<B>) -> Result<SocketAddr, String> {
        let Some(peer) = peer::socket_addr(request) else {
            return Err(
                "the address of the caller is not known; serve the app with \
                `into_make_service_with_connect_info::<SocketAddr>()`"
                    .into(),
            );
        };
        let headers = request.headers();
        let is_of_proxy = |name: &&str| {
            ADDED_BY_PROXIES.contains(name)
                || PREFIXES_OF_PROXIES
                    .iter()
                    .any(|prefix| name.starts_with(prefix))
        };
        // Names of header fields are in lower case here.
        if let Some(field) = headers.keys().map(HeaderName::as_str).find(is_of_proxy) {
            return Err(format!(
                "the call from {peer} has the field {field} of a proxy"
            ));
        }
        let address = peer.ip().to_canonical();
        let allowed = address.is_loopback()
            || self.addresses.contains(&address)
            || self.allowed_if.as_ref().is_some_and(|it| it(address));
        if allowed {
            Ok(peer)
        } else {
            Err(format!(
                "the address {address} is not allowed to stop this service"
            ))
        }
    }
}
