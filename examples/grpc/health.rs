//! tonic's health service, with `Watch` streams that end when draining starts. Without this wrapper they
//! never end, and the drain deadline cuts every stream that does not end.

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
    /// Reports the health that is set on `reporter`.
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
