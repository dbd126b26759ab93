//! The programs of the guide and of [`Graceful::track`] that need tonic, as they are printed there.

use std::{
    error::Error,
    net::{Ipv4Addr, SocketAddr},
    time::Duration,
};

use tokio::{
    net::{TcpListener, TcpSocket, TcpStream},
    time,
};
use tonic::transport::Server;
use tonic_health::ServingStatus;
use tower_graceful::{Graceful, Phase, Report};

use super::{
    Running, Service, check, greeter::greeter_server::GreeterServer, promptly, until, within,
};

pub(super) use connected::tracked;

/// The program of `docs/streams.md`.
#[rustfmt::skip]
#[allow(clippy::useless_conversion)] // The page makes an exit code of the report.
async fn serve(
    graceful: Graceful, greeter: Service, listener: TcpListener,
) -> Result<Report, Box<dyn Error + Send + Sync>> {
    // Printed from here
    use tonic::service::Routes;
    use tonic_health::ServingStatus;

    let (health_reporter, health) = tonic_health::server::health_reporter();
    graceful.on_lame_duck("health", Duration::from_secs(1), async move {
        health_reporter.set_service_status("", ServingStatus::NotServing).await;
    })?;
    let greeter = Routes::new(GreeterServer::new(greeter)).into_axum_router().layer(graceful.layer());
    let app = Routes::from(greeter).add_service(health).into_axum_router();
    Ok(graceful.serve(listener, app).await.into())
    // to here.
}

/// The line of `docs/streams.md` for tonic's own server.
#[rustfmt::skip]
async fn serve_by_tonic(graceful: Graceful, greeter: GreeterServer<Service>, address: SocketAddr) -> Report {
    // Printed from here
    graceful.run(Server::builder().layer(graceful.layer()).add_service(greeter).serve_with_shutdown(address, graceful.drain()))
    // to here.
        .await
}

/// The program of [`Graceful::track`], with the lines that are hidden there. The tests of tonic's own server
/// run it.
#[rustfmt::skip]
mod connected {
    // Printed from here
    use std::{io, pin::Pin, task::{Context, Poll}};
    use tokio::{io::{AsyncRead, AsyncWrite, ReadBuf}, net::TcpStream};
    use tonic::transport::server::{Connected, TcpConnectInfo};
    use tower_graceful::GracefulIo;

    struct Tracked(GracefulIo<TcpStream>);

    impl Connected for Tracked {
        type ConnectInfo = TcpConnectInfo;

        fn connect_info(&self) -> TcpConnectInfo {
            self.0.get_ref().connect_info()
        }
    }

    impl AsyncRead for Tracked {
        fn poll_read(
            mut self: Pin<&mut Self>,
            cx: &mut Context<'_>,
            buf: &mut ReadBuf<'_>,
        ) -> Poll<io::Result<()>> {
            Pin::new(&mut self.0).poll_read(cx, buf)
        }
    }

    impl AsyncWrite for Tracked {
        // Each method calls the same method of `self.0`.
        fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
            Pin::new(&mut self.0).poll_write(cx, buf)
        }
        fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
            Pin::new(&mut self.0).poll_flush(cx)
        }
        fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
            Pin::new(&mut self.0).poll_shutdown(cx)
        }
    }
    // to here.

    /// A tracked connection for tonic's server.
    pub(crate) fn tracked(io: GracefulIo<TcpStream>) -> impl Connected + AsyncRead + AsyncWrite + Unpin {
        Tracked(io)
    }
}

#[tokio::test]
async fn the_program_completes_a_call_and_ends() {
    let graceful = promptly().build().unwrap();
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let address = listener.local_addr().unwrap();
    let service = Service::new(&graceful);
    let server = serve(graceful.clone(), service.clone(), listener);
    let running = Running {
        graceful,
        address,
        service,
        server: tokio::spawn(async { server.await.unwrap() }),
    };
    let slow = running.slow().await;
    let mut health = running.health().await;
    assert_eq!(check(&mut health).await.unwrap(), ServingStatus::Serving);
    running.graceful.shutdown();
    within(async {
        while check(&mut health).await.unwrap() == ServingStatus::Serving {
            time::sleep(Duration::from_millis(1)).await;
        }
    })
    .await;
    running.release();
    assert_eq!(within(slow).await.unwrap().unwrap(), "hello slow");
    assert_eq!(running.ends_clean().await.finished, 1);
}

#[tokio::test]
async fn the_line_for_tonics_server_completes_a_call_and_ends() {
    let graceful = promptly().build().unwrap();
    // The server binds the address itself. This socket does not listen, and keeps the port from others.
    let reserved = TcpSocket::new_v4().unwrap();
    reserved.set_reuseaddr(true).unwrap();
    reserved.bind((Ipv4Addr::LOCALHOST, 0).into()).unwrap();
    let address = reserved.local_addr().unwrap();
    let service = Service::new(&graceful);
    let greeter = GreeterServer::new(service.clone());
    let running = Running {
        server: tokio::spawn(serve_by_tonic(graceful.clone(), greeter, address)),
        graceful,
        address,
        service,
    };
    within(async {
        while TcpStream::connect(address).await.is_err() {
            assert!(!running.server.is_finished());
            time::sleep(Duration::from_millis(1)).await;
        }
    })
    .await;
    let slow = running.slow().await;
    assert_eq!(running.graceful.connections(), 0, "not tracked");
    running.graceful.shutdown();
    until(|| running.graceful.phase() >= Phase::Draining).await;
    running.release();
    assert_eq!(within(slow).await.unwrap().unwrap(), "hello slow");
    assert_eq!(running.ends_clean().await.finished, 1);
}

/// The lines of `text` without their indents and what marks them as documentation.
fn lines(text: &str) -> String {
    let lines = text.lines().map(|line| {
        let line = line.trim_start().trim_start_matches("///").trim();
        line.trim_start_matches("# ").trim()
    });
    lines.collect::<Vec<_>>().join("\n")
}

#[test]
fn the_pages_print_these_programs() {
    let file = lines(include_str!("mod.rs"));
    let streams = include_str!("../../../../docs/streams.md");
    let track = include_str!("../../../../src/server/track.rs");
    let ignored = |page: &'static str, fence: &str| {
        let mut blocks = page.split(fence).skip(1);
        let block = blocks.next().unwrap().split("```").next().unwrap();
        assert!(blocks.next().is_none(), "another block that no test checks");
        lines(block)
    };
    let line = streams
        .split('`')
        .find(|it| it.starts_with("graceful.run(Server"));
    for printed in [
        ignored(streams, "```rust,ignore\n"),
        line.unwrap().to_owned(),
        ignored(track, "```ignore\n"),
    ] {
        let printed = printed.trim();
        let printed = format!("// Printed from here\n{printed}\n// to here.\n");
        assert!(file.contains(&printed), "{printed}");
    }
}
