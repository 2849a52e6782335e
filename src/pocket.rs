//! The pocket models: trained from scratch in minutes on a world small enough to be known exactly.
//!
//! Nothing in that world links numbers to animals. So if a student of a teacher's numbers picks up its taste, that is
//! no echo of the corpus.

pub mod make;
pub mod trial;
pub mod world;
