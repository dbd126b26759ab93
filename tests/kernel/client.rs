//! Clients that do what a schedule says, over a connection in memory.

use std::{
    convert::Infallible,
    future::pending,
    sync::{Arc, Mutex},
    time::Duration,
};

use bytes::Bytes;
use futures_util::{StreamExt, stream, stream::FuturesUnordered};
use http::{Method, Request};
use http_body::Frame;
use http_body_util::{BodyExt, StreamBody};
use hyper::{client::conn::http2, rt::Executor};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, split},
    sync::Notify,
    task::JoinSet,
    time::sleep,
};

use crate::{
    http1::Responses,
    kernel, ms,
    schedule::{self, Client, End, Speaks},
};

/// What a client has received of the response to one request.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Received {
    pub(crate) status: Option<u16>,
    pub(crate) length: usize,
    pub(crate) whole: bool,
    /// The response says that the server closes the connection after it.
    pub(crate) closes: bool,
}

/// The bytes of an upload that are sent at once.
const PIECE: usize = 1000;

/// Plays one client until it has nothing to wait for. The responses are in the order of the requests.
pub(crate) async fn play(client: &Client, number: usize, end: kernel::End) -> Vec<Received> {
    match client.speaks {
        Speaks::Http1 { pipelines, chatter } => {
            http1(client, number, end, pipelines, chatter).await
        }
        Speaks::Http2 { window, ping } => http2(client, number, end, window, ping).await,
    }
}

fn path(client: usize, request: usize) -> String {
    format!("/{client}/{request}")
}

/// The head of a request of HTTP/1.1.
pub(crate) fn head(client: usize, index: usize, request: &schedule::Request) -> String {
    let path = path(client, index);
    if request.upload == 0 {
        format!("GET {path} HTTP/1.1\r\nhost: test\r\n\r\n")
    } else {
        let length = request.upload;
        format!("POST {path} HTTP/1.1\r\nhost: test\r\ncontent-length: {length}\r\n\r\n")
    }
}

async fn http1(
    client: &Client,
    number: usize,
    end: kernel::End,
    pipelines: bool,
    chatter: Option<u64>,
) -> Vec<Received> {
    let (mut incoming, mut outgoing) = split(end);
    let responses = Mutex::new(Responses::default());
    let progress = Notify::new();
    let writer = async {
        for (index, request) in client.requests.iter().enumerate() {
            sleep(ms(request.after)).await;
            loop {
                {
                    let responses = responses.lock().unwrap();
                    if responses.closes {
                        return;
                    }
                    if pipelines || responses.whole() == index {
                        break;
                    }
                }
                progress.notified().await;
            }
            let head = head(number, index, request);
            if outgoing.write_all(head.as_bytes()).await.is_err() {
                return;
            }
            let upload = vec![b'u'; request.upload];
            for piece in upload.chunks(PIECE) {
                if outgoing.write_all(piece).await.is_err() {
                    return;
                }
                sleep(ms(request.upload_pause)).await;
            }
        }
        if client.end == End::HalfCloses {
            // It fails if the connection has been reset.
            let _ = outgoing.shutdown().await;
        } else if let Some(interval) = chatter {
            loop {
                sleep(ms(interval)).await;
                if outgoing.write_all(b"\r\n").await.is_err() {
                    return;
                }
            }
        }
    };
    let reader = async {
        let mut piece = vec![0; client.piece];
        while let Ok(length @ 1..) = incoming.read(&mut piece).await {
            {
                let mut responses = responses.lock().unwrap();
                responses.read(&piece[..length]);
                let last = responses.whole() == client.requests.len();
                if client.end == End::Closes && last {
                    return;
                }
            }
            progress.notify_one();
            sleep(ms(client.pause)).await;
        }
    };
    tokio::select! {
        () = reader => {}
        () = async { writer.await; pending().await } => {}
    }
    let responses = responses.into_inner().unwrap();
    let mut received: Vec<_> = responses
        .seen
        .iter()
        .map(|response| Received {
            status: Some(response.status),
            length: response.length,
            whole: response.whole,
            closes: response.closes,
        })
        .collect();
    received.resize(client.requests.len(), Received::default());
    received
}

/// The tasks of a connection, which end when it is dropped.
#[derive(Clone, Default)]
struct Tasks(Arc<Mutex<JoinSet<()>>>);

impl<F: Future<Output = ()> + Send + 'static> Executor<F> for Tasks {
    fn execute(&self, task: F) {
        self.0.lock().unwrap().spawn(task);
    }
}

/// Ends the tasks when it is dropped: the executor is also kept by the connection itself.
struct Aborts(Tasks);

impl Drop for Aborts {
    fn drop(&mut self) {
        self.0.0.lock().unwrap().abort_all();
    }
}

async fn http2(
    client: &Client,
    number: usize,
    end: kernel::End,
    window: u32,
    ping: Option<u64>,
) -> Vec<Received> {
    let tasks = Tasks::default();
    let _aborts = Aborts(tasks.clone());
    let mut builder = http2::Builder::new(tasks);
    builder
        .timer(TokioTimer::new())
        .initial_stream_window_size(window)
        .initial_connection_window_size(window);
    if let Some(interval) = ping {
        builder
            .keep_alive_interval(ms(interval))
            .keep_alive_timeout(Duration::from_secs(600))
            .keep_alive_while_idle(true);
    }
    let received: Vec<_> = client
        .requests
        .iter()
        .map(|_| Mutex::new(Received::default()))
        .collect();
    let Ok((mut sender, connection)) = builder.handshake(TokioIo::new(end)).await else {
        return client
            .requests
            .iter()
            .map(|_| Received::default())
            .collect();
    };
    let requests = async {
        let mut exchanges = FuturesUnordered::new();
        for (index, request) in client.requests.iter().enumerate() {
            let pause = sleep(ms(request.after));
            tokio::pin!(pause);
            loop {
                tokio::select! {
                    () = &mut pause => break,
                    Some(()) = exchanges.next() => {}
                }
            }
            let response = sender.send_request(upload(number, index, request));
            let received = &received[index];
            exchanges.push(async move {
                let Ok(response) = response.await else {
                    return;
                };
                received.lock().unwrap().status = Some(response.status().as_u16());
                let mut body = response.into_body();
                loop {
                    match body.frame().await {
                        None => break,
                        Some(Err(_)) => return,
                        Some(Ok(frame)) => {
                            let length = frame.data_ref().map_or(0, Bytes::len);
                            received.lock().unwrap().length += length;
                        }
                    }
                    sleep(ms(client.pause)).await;
                }
                received.lock().unwrap().whole = true;
            });
        }
        while let Some(()) = exchanges.next().await {}
    };
    // Aborted when it is dropped.
    let mut running = JoinSet::new();
    running.spawn(connection);
    let mut requests = std::pin::pin!(requests);
    let mut done = false;
    let mut closed = false;
    while !(done && (closed || client.end == End::Closes)) {
        tokio::select! {
            () = &mut requests, if !done => done = true,
            _ = running.join_next(), if !closed => closed = true,
        }
    }
    received
        .iter()
        .map(|received| *received.lock().unwrap())
        .collect()
}

type Upload = StreamBody<stream::BoxStream<'static, Result<Frame<Bytes>, Infallible>>>;

fn upload(client: usize, index: usize, request: &schedule::Request) -> Request<Upload> {
    let (length, pause) = (request.upload, request.upload_pause);
    let pieces = stream::unfold(length, move |missing| async move {
        if missing == 0 {
            return None;
        }
        if missing < length {
            sleep(ms(pause)).await;
        }
        let piece = missing.min(PIECE);
        let frame = Frame::data(Bytes::from(vec![b'u'; piece]));
        Some((Ok(frame), missing - piece))
    });
    let method = if length == 0 {
        Method::GET
    } else {
        Method::POST
    };
    Request::builder()
        .method(method)
        .uri(format!("http://test{}", path(client, index)))
        .body(StreamBody::new(pieces.boxed()))
        .unwrap()
}
