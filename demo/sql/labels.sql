-- One moment per household and day, at a time of day drawn from a digest, and whether the household buys
-- again within the 7 days after it: in (event_timestamp, event_timestamp + 7 days]. The answer is known only
-- when those days are over; moments whose answer is not known before the data ends are left out.

CREATE TEMP TABLE labels AS
WITH drawn AS (
    SELECT user_id,
           getvariable('origin') + to_days(day::INTEGER)
           + to_seconds(('0x' || left(md5(user_id || ':' || day), 8))::BIGINT % 86400) AS moment
    FROM (SELECT user_id, unnest(range(first_day + 1, getvariable('snapshots'))) AS day FROM users)
)
SELECT drawn.user_id,
       drawn.moment                                                      AS event_timestamp,
       coalesce(baskets.bought_at <= drawn.moment + INTERVAL 7 DAY, false)::BIGINT AS label,
       drawn.moment + INTERVAL 7 DAY                                     AS label_known_at
FROM drawn
ASOF LEFT JOIN baskets ON baskets.user_id = drawn.user_id AND baskets.bought_at > drawn.moment
WHERE drawn.moment + INTERVAL 7 DAY <= getvariable('stop');
