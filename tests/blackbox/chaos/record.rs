//! What the server under test notes about each request that has a number (`?id=`), and prints at its end.
//!
//! The notes are taken directly outside the layer. A request is admitted, answered and released while the
//! service inside is called, polled or dropped. So the phase before and the phase after that call enclose
//! the phase at the event itself.

use std::{
    collections::BTreeMap,
    pin::Pin,
    sync::{Arc, Mutex},
    task::{Context, Poll, ready},
};

use axum::{
    Router,
    body::{Body, Bytes},
    extract::Request,
    http::{HeaderValue, Uri},
    middleware::{Next, from_fn},
    response::Response,
};
use hyper::body::{Body as _, Frame, SizeHint};
use tower_graceful::{Graceful, Phase, Report};

use super::notes::{End, Note, Tally};

/// The notes of this server.
#[derive(Clone)]
pub(crate) struct Record {
    graceful: Graceful,
    notes: Arc<Mutex<BTreeMap<u64, Note>>>,
}

fn id(uri: &Uri) -> Option<u64> {
    uri.query()?.strip_prefix("id=")?.parse().ok()
}

impl Record {
    pub(crate) fn new(graceful: &Graceful) -> Self {
        Self {
            graceful: graceful.clone(),
            notes: Arc::default(),
        }
    }

    /// Notes which requests reach a handler. Belongs inside the layer.
    pub(crate) fn inside(record: Option<&Self>, router: Router) -> Router {
        let Some(record) = record.cloned() else {
            return router;
        };
        router.layer(from_fn(move |request: Request, next: Next| {
            if let Some(id) = id(request.uri()) {
                record.note(id, |note| note.admitted = true);
            }
            next.run(request)
        }))
    }

    /// Notes everything else. Belongs outside the layer.
    pub(crate) fn outside(record: Option<&Self>, router: Router) -> Router {
        let Some(record) = record.cloned() else {
            return router;
        };
        router.layer(from_fn(move |request: Request, next: Next| {
            let record = record.clone();
            async move {
                let Some(id) = id(request.uri()) else {
                    return next.run(request).await;
                };
                let called = Called {
                    future: Some(Box::pin(next.run(request))),
                    polled: false,
                    id,
                    record,
                };
                called.await
            }
        }))
    }

    fn note(&self, id: u64, change: impl FnOnce(&mut Note)) {
        change(self.notes.lock().unwrap().entry(id).or_default());
    }

    fn ended(&self, id: u64, end: End, before: Phase) {
        let after = self.graceful.phase();
        self.note(id, |note| {
            note.end = end;
            note.ended = [before, after];
        });
    }

    /// Prints the notes and the parts of the report.
    pub(crate) fn print(&self, report: &Report) {
        for (id, note) in &*self.notes.lock().unwrap() {
            println!("note {id} {}", note.encode());
        }
        println!("tally {}", Tally::of(report).encode());
        for request in report.requests_cut() {
            println!("cut-request {}", request.path);
        }
        for connection in report.connections_cut() {
            let peer = connection.peer.map(|peer| peer.to_string());
            let peer = peer.unwrap_or_default();
            println!("cut-connection {peer} {}", connection.undelivered);
        }
    }
}

/// The call of the service inside.
struct Called<F> {
    future: Option<Pin<Box<F>>>,
    polled: bool,
    id: u64,
    record: Record,
}

impl<F: Future<Output = Response>> Future for Called<F> {
    type Output = Response;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Response> {
        let this = &mut *self;
        let future = this.future.as_mut().expect("polled after it was ready");
        let before = this.record.graceful.phase();
        let polled = future.as_mut().poll(cx);
        let after = this.record.graceful.phase();
        if !std::mem::replace(&mut this.polled, true) {
            this.record
                .note(this.id, |note| note.called = [before, after]);
        }
        let mut response = ready!(polled);
        this.future = None;
        let status = response.status().as_u16();
        this.record.note(this.id, |note| {
            note.status = status;
            note.answered = before;
        });
        let number = HeaderValue::from(this.id);
        response.headers_mut().insert("x-id", number);
        let over = response.body().is_end_stream();
        if over {
            this.record.ended(this.id, End::Ended, before);
        }
        let watched = |body| Watched {
            body: Some(body),
            over,
            id: this.id,
            record: this.record.clone(),
        };
        Poll::Ready(response.map(|body| Body::new(watched(body))))
    }
}

impl<F> Drop for Called<F> {
    fn drop(&mut self) {
        if let Some(future) = self.future.take() {
            let before = self.record.graceful.phase();
            drop(future);
            self.record.ended(self.id, End::Unanswered, before);
        }
    }
}

/// The body of a response.
struct Watched {
    body: Option<Body>,
    over: bool,
    id: u64,
    record: Record,
}

impl Watched {
    fn over(&mut self, end: End, before: Phase) {
        if !std::mem::replace(&mut self.over, true) {
            self.record.ended(self.id, end, before);
        }
    }
}

impl hyper::body::Body for Watched {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let this = &mut *self;
        let body = this.body.as_mut().expect("present until it is dropped");
        let before = this.record.graceful.phase();
        let frame = ready!(Pin::new(&mut *body).poll_frame(cx));
        let ended = body.is_end_stream();
        match &frame {
            Some(Err(_)) => this.over(End::Failed, before),
            Some(Ok(_)) if !ended => {}
            _ => this.over(End::Ended, before),
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.as_ref().is_none_or(Body::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        self.body.as_ref().map(Body::size_hint).unwrap_or_default()
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        let before = self.record.graceful.phase();
        self.body = None;
        self.over(End::Left, before);
    }
}

/// A body that fails after its first frame.
pub(crate) async fn failing() -> Body {
    let whole = Body::from("before the failure").into_data_stream();
    let error = futures_util::stream::once(async { Err(axum::Error::new("it fails")) });
    Body::from_stream(futures_util::StreamExt::chain(whole, error))
}
