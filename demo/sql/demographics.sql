-- What the survey says of a household, repeated every Monday with its store of the last 90 days; the first
-- row is at the first midnight of the data. Bands become numbers at their middle (an open band: a fifth
-- above its lower bound).

CREATE TEMP TABLE demographics AS
WITH mondays AS (
    SELECT m, getvariable('origin') + to_days(m::INTEGER) AS midnight
    FROM (SELECT unnest(range(0, getvariable('snapshots') + 1)) AS m)
    WHERE m = 0 OR isodow(midnight) = 1
),
visits AS (
    SELECT user_id, m, store_id, sum(baskets) AS visits, max(bought_at) AS last_visit
    FROM mondays
    JOIN baskets ON baskets.day < mondays.m AND baskets.day >= mondays.m - 90
    GROUP BY ALL
),
homes AS (
    SELECT user_id, m, arg_max(store_id, (visits, last_visit, store_id)) AS store_id
    FROM visits
    GROUP BY user_id, m
),
survey AS (
    SELECT household_id AS user_id, age AS age_band, income AS income_band, home_ownership, marital_status,
           left(household_size, 1)::BIGINT AS household_size,
           left(kids_count, 1)::BIGINT     AS kids_count,
           regexp_extract_all(age, '\d+')::BIGINT[]    AS years,
           regexp_extract_all(income, '\d+')::BIGINT[] AS thousands
    FROM read_parquet(getvariable('demographics_source'))
)
SELECT user_id,
       midnight                                                              AS event_timestamp,
       midnight + INTERVAL 3 HOUR + to_minutes((37 * m) % 60)                AS created,
       (CASE WHEN len(years) = 2 THEN (years[1] + years[2] + 1) // 2 ELSE years[1] * 6 // 5 END)::BIGINT AS age,
       age_band,
       (CASE WHEN income_band LIKE 'Under%' THEN 500 * thousands[1]
             WHEN len(thousands) = 2 THEN 500 * (thousands[1] + thousands[2] + 1)
             ELSE 1200 * thousands[1] END)::DOUBLE                     AS income,
       income_band,
       household_size,
       kids_count,
       CASE WHEN home_ownership LIKE '%Homeowner' THEN true
            WHEN home_ownership LIKE '%Renter' THEN false END          AS home_owner,
       marital_status,
       'store_' || homes.store_id                                      AS location
FROM survey
CROSS JOIN mondays
LEFT JOIN homes USING (user_id, m);
