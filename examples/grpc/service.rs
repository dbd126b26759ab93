//! A call with one response, and one with a stream that ends when the service drains.

use std::{pin::Pin, time::Duration};

use futures_util::{Stream, StreamExt, stream};
use tokio::time;
use tonic::{Request, Response, Status};
use tower_graceful::Graceful;

use crate::greeter::{HelloReply, HelloRequest, Tick, TicksRequest, greeter_server::Greeter};

pub(crate) struct Service {
    pub(crate) graceful: Graceful,
}

#[tonic::async_trait]
impl Greeter for Service {
    async fn hello(&self, request: Request<HelloRequest>) -> Result<Response<HelloReply>, Status> {
        let message = format!("hello {}", request.into_inner().name);
        Ok(Response::new(HelloReply { message }))
    }

    type TicksStream = Pin<Box<dyn Stream<Item = Result<Tick, Status>> + Send>>;

    async fn ticks(&self, _: Request<TicksRequest>) -> Result<Response<Self::TicksStream>, Status> {
        let ticks = stream::iter(1..).then(|count| async move {
            time::sleep(Duration::from_secs(1)).await;
            Ok(Tick { count })
        });
        // Without this the drain would wait for the stream, and cut it at the drain deadline.
        let ticks = self.graceful.until_draining(ticks);
        let last = Err(Status::unavailable("shutting down"));
        Ok(Response::new(Box::pin(ticks.and_last(last))))
    }
}
