//! Single requests, each on a new connection.

use std::time::Duration;

use http_body_util::{BodyExt, Empty};
use hyper::{Request, Response, StatusCode, body::Incoming, header};
use tokio::time::timeout;

use crate::load::{How, connect};

/// The timeout of `get`.
pub(crate) const PROBE: Duration = Duration::from_secs(1);

/// Sends one `GET` on a new connection, and returns the status.
pub(crate) async fn get(port: u16, path: &str) -> Result<StatusCode, How> {
    once(port, "GET", path, PROBE).await
}

/// Sends one request without a body on a new connection, and returns the status.
pub(crate) async fn once(
    port: u16,
    method: &str,
    path: &str,
    bound: Duration,
) -> Result<StatusCode, How> {
    at(&local(port), method, path, bound).await
}

/// The same to `HOST:PORT`.
pub(crate) async fn at(
    target: &str,
    method: &str,
    path: &str,
    bound: Duration,
) -> Result<StatusCode, How> {
    let exchange = async { Ok(begin(target, method, path, None).await?.status()) };
    timeout(bound, exchange).await.unwrap_or(Err(How::TimedOut))
}

/// Sends one `GET` as a proxy forwards it, with `X-Forwarded-For`, and returns the status.
pub(crate) async fn forwarded(port: u16, path: &str, bound: Duration) -> Result<StatusCode, How> {
    let client = Some(("x-forwarded-for", "192.0.2.1"));
    let exchange = async { Ok(begin(&local(port), "GET", path, client).await?.status()) };
    timeout(bound, exchange).await.unwrap_or(Err(How::TimedOut))
}

/// Sends one `GET` on a new connection, and returns the status and the body as text.
pub(crate) async fn text(
    port: u16,
    path: &str,
    bound: Duration,
) -> Result<(StatusCode, String), How> {
    let exchange = async {
        let response = begin(&local(port), "GET", path, None).await?;
        let status = response.status();
        let body = response.into_body().collect().await;
        let body = body.map_err(|_| How::Truncated)?.to_bytes();
        Ok((status, String::from_utf8_lossy(&body).into_owned()))
    };
    timeout(bound, exchange).await.unwrap_or(Err(How::TimedOut))
}

fn local(port: u16) -> String {
    format!("127.0.0.1:{port}")
}

async fn begin(
    target: &str,
    method: &str,
    path: &str,
    field: Option<(&str, &str)>,
) -> Result<Response<Incoming>, How> {
    let mut sender = connect(target).await?;
    let mut request = Request::builder()
        .method(method)
        .uri(path)
        .header(header::HOST, target)
        .header(header::CONNECTION, "close");
    if let Some((name, value)) = field {
        request = request.header(name, value);
    }
    let request = request.body(Empty::new().boxed()).map_err(|_| How::Reset)?;
    sender.send_request(request).await.map_err(|_| How::Reset)
}
