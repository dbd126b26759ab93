//! tonic's health service, whose `Watch` streams end when draining starts. By themselves they never
//! do, and a stream that does not end is cut at the drain deadline.

use tonic::{Request, Response, Status};
use tonic_health::{
    pb::{HealthCheckRequest, HealthCheckResponse, health_server},
    server::{HealthReporter, HealthService, WatchStream},
};
use tower_graceful::{Graceful, UntilDraining};

pub struct Health {
    service: HealthService,
    graceful: Graceful,
}

impl Health {
    /// Tells what `reporter` is told.
    pub fn new(reporter: &HealthReporter, graceful: &Graceful) -> Self {
        Self {
            service: HealthService::from_health_reporter(reporter.clone()),
            graceful: graceful.clone(),
        }
    }
}

#[tonic::async_trait]
impl health_server::Health for Health {
    type WatchStream = UntilDraining<WatchStream>;

    async fn check(
        &self,
        request: Request<HealthCheckRequest>,
    ) -> Result<Response<HealthCheckResponse>, Status> {
        self.service.check(request).await
    }

    async fn watch(
        &self,
        request: Request<HealthCheckRequest>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        let watched = self.service.watch(request).await?;
        let last = Err(Status::unavailable("shutting down"));
        Ok(watched.map(|statuses| self.graceful.until_draining(statuses).and_last(last)))
    }
}
